"""The attentive probe beside an attention layer with keys and values of every token."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from evaluation.probes.attentive import AttentiveGrid, count_steps, fit_attentive, rate_at
from evaluation.probes.config import AttentiveConfig

CPU = torch.device("cpu")
DIM, CLASSES = 128, 3


class PlainAttention(nn.Module):
    """Keys and values of every token, heads of 64, biases of the keys too; weights of one classifier of a grid."""

    def __init__(self, grid: AttentiveGrid, index: int) -> None:
        super().__init__()
        names = ("query", "key", "value", "classifier", "value_bias", "classifier_bias")
        for name in names:
            setattr(self, name, nn.Parameter(getattr(grid, name)[index].detach().clone()))
        self.key_bias = nn.Parameter(torch.full((DIM,), 0.3))

    def forward(self, tokens):
        def in_heads(rows):
            return rows.view(*rows.shape[:2], 2, 64).transpose(1, 2)

        query = in_heads(self.query.expand(len(tokens), 1, -1))
        keys = in_heads(tokens @ self.key.T + self.key_bias)
        values = in_heads(tokens @ self.value.T + self.value_bias)
        read = scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(1)
        return read @ self.classifier.T + self.classifier_bias


def draw(num=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 9, DIM, generator=generator), torch.randint(
        0, CLASSES, (num,), generator=generator
    )


def test_the_folded_computation_is_the_same_function_and_has_the_same_gradients():
    grid = AttentiveGrid(DIM, CLASSES, 2, torch.Generator().manual_seed(1))
    with torch.no_grad():  # far from where softmax is flat
        for part in grid.parameters():
            part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(part.numel())) * 0.2)
        grid.query[1].mul_(-2)
    tokens, labels = draw()
    logits = grid(tokens)
    sum(cross_entropy(own, labels) for own in logits).backward()
    for index in range(2):
        plain = PlainAttention(grid, index)
        expected = plain(tokens)
        torch.testing.assert_close(logits[index], expected, rtol=1e-4, atol=1e-4)
        cross_entropy(expected, labels).backward()
        for name in ("query", "key", "value", "classifier", "value_bias", "classifier_bias"):
            ours, theirs = getattr(grid, name)[index].grad, getattr(plain, name).grad
            assert (ours - theirs).abs().max() < 1e-4 * max(1.0, float(theirs.abs().max())), name
        assert plain.key_bias.grad.abs().max() < 1e-5  # what the softmax takes away is not learned
    assert not torch.equal(logits[0], logits[1])


def test_classifiers_do_not_see_each_other():
    tokens, labels = draw()
    config = AttentiveConfig(batch_size=16)
    settings = [(1e-3, 5e-4), (1e-2, 5e-2)]
    options = {"config": config, "num_classes": CLASSES, "steps": 6, "seed": 3, "device": CPU}
    together = fit_attentive(tokens, labels, settings, **options).logits(tokens)
    for index, setting in enumerate(settings):
        alone = fit_attentive(tokens, labels, [setting], **options).logits(tokens)[0]
        torch.testing.assert_close(together[index], alone, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_rates_are_per_256_images_and_biases_do_not_decay():
    grid = AttentiveGrid(DIM, CLASSES, 2, torch.Generator())
    groups = grid.parameter_groups([(1e-3, 0.1), (1e-2, 0.2)])
    assert [(g["base_lr"], g["weight_decay"]) for g in groups] == [
        (1e-3, 0.1),
        (1e-3, 0),
        (1e-2, 0.2),
        (1e-2, 0),
    ]
    assert {p.ndim for g in groups[1::2] for p in g["params"]} == {1}
    assert sum(len(g["params"]) for g in groups) == len(list(grid.parameters()))


def test_it_finds_the_one_token_that_tells():
    """A class is a direction in one token of nine, at a random place and as long as the noise of the others."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (400,), generator=generator)
    tokens = torch.randn(400, 9, DIM, generator=generator)
    marks = torch.randn(CLASSES, DIM, generator=generator) * 1.5 + torch.randn(DIM, generator=generator)
    tokens[torch.arange(400), torch.randint(0, 9, (400,), generator=generator)] = marks[labels]
    config = AttentiveConfig(batch_size=64)
    options = {"config": config, "num_classes": CLASSES, "steps": 80, "seed": 0, "device": CPU}
    fit = fit_attentive(tokens[:300].half(), labels[:300], [(1e-2, 5e-4)], **options)
    assert (fit.logits(tokens[300:])[0].argmax(dim=1) == labels[300:]).double().mean() > 0.9


def test_steps_and_schedule():
    config = AttentiveConfig()
    assert count_steps(config, 1_281_167) == 12_500 and count_steps(config, 384) == 38
    factors = [rate_at(step, 100, 0.1) for step in range(100)]
    assert (
        factors[0] == 0
        and factors[10] == 1
        and factors[99] < 0.001
        and factors == sorted(factors[:11]) + sorted(factors[11:], reverse=True)
    )


def test_dimensions_that_heads_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="have 200 dimensions; expected a multiple of 64"):
        AttentiveGrid(200, CLASSES, 1, torch.Generator())
