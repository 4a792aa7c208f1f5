#!/usr/bin/env bash
# A new head of timm's EfficientNets begins the louder, the fewer classes it has.
#
# Guess: `timm.create_model(name, num_classes=10)` gives a linear layer that begins as torch's own does, at ±1/√inputs,
# so that the first loss is about ln 10 and the first gradients leave pretrained features as they are, in all families.
# So is: EfficientNet and its kin draw the head's weights from ±1/√classes, ten times as wide with 1,280 inputs and 10
# classes. ResNets and vision transformers begin about as torch's own layer does. On features as they come out of the last
# ReLU the first loss of EfficientNet is far above ln 10, and its gradients by the features are many times a ResNet's.
# Fine-tuning with one rate for all layers pays for it in the first steps; a head set to zero does not.
# Seen with timm 1.0.31 and torch 2.14.1 on Python 3.11. Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet 'timm==1.0.31' 'torch==2.14.1'
"$folder/env/bin/python" - <<'PYTHON'
import math

import timm
import torch
import torch.nn.functional as F

CLASSES = 10
torch.manual_seed(0)
label = torch.randint(CLASSES, (64,))
loud = []
for name in ("efficientnet_b0", "tf_efficientnet_lite0", "mobilenetv3_small_100", "resnet18", "vit_tiny_patch16_224"):
    head = timm.create_model(name, num_classes=CLASSES).get_classifier()
    feature = torch.rand(64, head.in_features).requires_grad_()
    loss = F.cross_entropy(head(feature), label)
    (gradient,) = torch.autograd.grad(loss, feature)
    bound, usual = head.weight.abs().max().item(), 1 / math.sqrt(head.in_features)
    print(f"{name}: |w| up to {bound:.3f} (torch's own: {usual:.3f}), first loss {loss.item():.2f} (ln 10: 2.30), "
          f"gradient by features {gradient.norm().item():.4f}")
    if bound > 5 * usual:
        assert 0.9 / math.sqrt(CLASSES) < bound <= 1 / math.sqrt(CLASSES)
        loud.append(name)
if loud != ["efficientnet_b0", "tf_efficientnet_lite0", "mobilenetv3_small_100"]:
    raise SystemExit(f"heads of {loud} begin loud now: this finding is out of date")
PYTHON
