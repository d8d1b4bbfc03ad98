"""What the panels cut out of images."""

import torch

from report.panels import _cut_patch


def test_a_patch_stands_bright_in_the_middle_of_its_dimmed_surroundings():
    image = torch.linspace(0.2, 1, 16).view(1, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)
    image = image.expand(3, -1, -1)
    for place, neighbours in ((5, (0, 1, 2, 4, 6, 8, 9, 10)), (0, (None, None, None, None, 1, None, 4, 5))):
        cut = _cut_patch(image, place, (4, 4)).float() / 255
        assert cut.shape[0] == 3 and cut.shape[1] == cut.shape[2]
        third = cut.shape[1] / 3
        centres = [int((0.5 + index) * third) for index in range(3)]
        cells = [float(cut[0, row, column]) for row in centres for column in centres]
        value = {index: float(image[0, 8 * (index // 4), 8 * (index % 4)]) for index in range(16)}
        assert abs(cells.pop(4) - value[place]) < 0.01
        for cell, neighbour in zip(cells, neighbours, strict=True):
            assert abs(cell - (0.0 if neighbour is None else 0.45 * value[neighbour])) < 0.01
