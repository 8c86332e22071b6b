"""Blocks of rows give the same result as one call."""

import numpy as np
import pytest

from worldmodel.resources import in_blocks


@pytest.mark.parametrize(("count", "block"), [(1, 4), (4, 4), (10, 4), (3, 1)])
def test_blocks_of_one_shape_give_every_row_once(count, block):
    values = np.arange(2.0 * count).reshape(count, 2)
    shapes = []

    def of_rows(rows):
        shapes.append(rows.shape)
        return {"row": rows, "value": values[rows]}

    found = in_blocks(of_rows, count, block)
    np.testing.assert_array_equal(found["row"], np.arange(count))
    np.testing.assert_array_equal(found["value"], values)
    assert set(shapes) == {(block,)} and len(shapes) == -(-count // block)
