"""What the extraction refuses to store."""

import numpy as np
import pytest

from dpt_ray.data.crops import Crop
from dpt_ray.stages.extract import Output, check_finite


@pytest.mark.parametrize("value", [np.nan, np.inf, 7e4])  # the last is too large for float16
def test_moments_that_are_not_finite_when_stored_are_refused(value):
    crop = Crop("adm", 8)
    output = Output("moments", None, "", crop, False, "float32", 0.0)
    values = np.zeros((3, 2, 2, 4, 4), np.float32)
    check_finite(output, ["a", "b", "c"], values)
    values[1, 0, 1, 2, 3] = value
    with pytest.raises(ValueError, match=r"image b are not finite \(1 of 3 images.*float32 already"):
        check_finite(output, ["a", "b", "c"], values)
