"""CAPI's predictor: what a prediction depends on, and what it does not."""

import pytest
import torch

from models.predictor import NOWHERE, Predictor

GRID = (4, 6)


def make(num_layers=3, **options):
    return Predictor(32, num_layers=num_layers, num_heads=4, **options).eval()


def make_inputs(num_images=3):
    """A class token and 8 patches that are seen, and 10 positions of those that are not, of each image."""
    order = torch.stack([torch.randperm(24) for _ in range(num_images)])
    nowhere = torch.full((num_images, 1), NOWHERE)
    return torch.randn(num_images, 9, 32), torch.cat([nowhere, order[:, :8]], dim=1), order[:, 8:18]


def test_one_prediction_a_position_with_gradients_for_tokens_and_all_parameters():
    predictor = make()
    tokens, token_positions, positions = make_inputs()
    tokens.requires_grad_()
    found = predictor(tokens, token_positions, positions, GRID)
    assert found.shape == (3, 10, 32)
    torch.testing.assert_close(found.square().mean(-1), torch.ones(3, 10), rtol=1e-2, atol=0)
    (found * torch.randn_like(found)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in predictor.named_parameters()}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    assert bool((tokens.grad.abs().amax(-1) > 0).all())


def test_a_prediction_depends_on_its_position_and_its_images_tokens_alone():
    predictor = make()
    tokens, token_positions, positions = make_inputs()
    whole = predictor(tokens, token_positions, positions, GRID)
    # Without the other queries, and without the other images.
    alone = predictor(tokens[1:2], token_positions[1:2], positions[1:2, 4:5], GRID)
    torch.testing.assert_close(alone[0, 0], whole[1, 4], rtol=1e-4, atol=1e-5)
    # With the tokens in another order.
    order = torch.randperm(9)
    shuffled = predictor(tokens[:, order], token_positions[:, order], positions, GRID)
    torch.testing.assert_close(shuffled, whole, rtol=1e-4, atol=1e-5)
    # Another place, or another token in a place, is another prediction; of this image only.
    moved = predictor(tokens, token_positions, positions.roll(1, dims=1), GRID)
    torch.testing.assert_close(moved, whole.roll(1, dims=1), rtol=1e-4, atol=1e-5)
    assert bool(((moved - whole).abs().amax(-1) > 1e-3).all())
    changed = tokens.clone()
    changed[0, 5] += 1
    difference = (predictor(changed, token_positions, positions, GRID) - whole).abs().amax(-1)
    assert bool((difference[0] > 1e-4).all()) and float(difference[1:].max()) < 1e-5


@pytest.mark.parametrize("by", [1, GRID[1]])
def test_places_enter_as_differences_and_a_token_that_stands_nowhere_has_none(by):
    """All patches one column or one row on: only the class token, which does not move with them, tells."""
    predictor = make()
    tokens = torch.randn(2, 5, 32)
    places, asked = torch.tensor([[0, 2, 7, 9]] * 2), torch.tensor([[1, 8, 10]] * 2)
    found = predictor(tokens[:, 1:], places, asked, GRID)
    torch.testing.assert_close(
        predictor(tokens[:, 1:], places + by, asked + by, GRID), found, rtol=1e-3, atol=1e-4
    )
    other = predictor(tokens[:, 1:], places, asked + by, GRID)
    assert float((other - found).abs().max()) > 1e-2
    # Not rotated, as what stands in the first patch; rows and columns before it would be.
    nowhere = predictor(tokens, torch.full((2, 5), NOWHERE), asked, GRID)
    first = predictor(tokens, torch.zeros(2, 5, dtype=torch.int64), asked, GRID)
    torch.testing.assert_close(nowhere, first)


def test_recomputed_blocks_and_a_grid_of_one_patch_change_nothing():
    plain, saving = make(), make(activation_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    inputs = make_inputs()
    gradients = []
    for predictor in (plain, saving):
        tokens = inputs[0].clone().requires_grad_()
        predictor(tokens, *inputs[1:], GRID)[..., 0].square().sum().backward()
        gradients.append([tokens.grad, *(parameter.grad for parameter in predictor.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0])
    zero = torch.zeros(1, 1, dtype=torch.int64)
    assert bool(plain(torch.randn(1, 1, 32), zero, zero, (1, 1)).isfinite().all())


def test_predictions_stay_in_the_dtype_of_half_precision_weights():
    tokens, token_positions, positions = make_inputs()
    found = make().bfloat16()(tokens.bfloat16(), token_positions, positions, GRID)
    assert found.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(make()(tokens, token_positions, positions, GRID).isfinite().all())


def test_drop_path_drops_whole_images_while_training_only():
    predictor = make(drop_path_rate=0.9).train()
    tokens, token_positions, positions = make_inputs(num_images=64)
    found = predictor(tokens, token_positions, positions, GRID)
    start = predictor.norm(predictor.mask_token)
    untouched = torch.isclose(found, start.expand_as(found), atol=1e-5).all(-1)
    assert bool((untouched.all(1) | ~untouched.any(1)).all())
    assert 20 < int(untouched.all(1).sum()) < 50  # .9^6 of 64 is 34
    predictor.eval()
    assert not bool(torch.isclose(predictor(tokens, token_positions, positions, GRID), start).all(-1).any())


def test_heads_whose_channels_rows_and_columns_cannot_share_are_refused():
    with pytest.raises(
        ValueError, match=r"model.predictor.num_heads is 16; expected a number that divides 32 / 4"
    ):
        Predictor(32, num_heads=16)
