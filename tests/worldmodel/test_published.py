"""Published figures in schema order."""

import numpy as np

from worldmodel import scaling, schema


def test_published_scaler_is_in_schema_order():
    scaler = scaling.published_scaler()
    assert scaler.mean[schema.INDEX["meanbp"]] == np.float32(77.77905508306031)
    assert scaler.std[schema.INDEX["lactate"]] == np.float32(1.158974607121898)
    np.testing.assert_allclose(scaler.static_mean, (63.763748, 0.0, 5.300441), rtol=1e-6)
    limits = scaling.CLIP_LOW < scaling.CLIP_HIGH
    assert limits[: schema.URINE].all()
