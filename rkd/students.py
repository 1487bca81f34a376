"""The students that `rkd students` lists (no torch)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Student:
    """A suggestion for `--student`."""

    name: str
    summary: str


STUDENTS = (
    Student("mobilenet", "MobileNet v3-small (Howard et al., 2019): the usual choice for a board"),
    Student("mobilenet-v2", "MobileNet v2 (Sandler et al., 2018): no squeeze-and-excite, kind to INT8"),
    Student("shufflenet-v2", "ShuffleNet v2 x1.0 (Ma et al., 2018): few memory accesses"),
    Student("resnet18", "ResNet-18 (He et al., 2016): plain convolutions, fast in TensorRT"),
    Student(
        "vgg11",
        "VGG-11 (Simonyan and Zisserman, 2015) with BN: large (9 M parameters at 32 pixels, 129 M from 73 on), but nothing except 3x3 convolutions",
    ),
    Student("resnet20", "CIFAR ResNet-20: 0.27 M parameters, for images of about 32 pixels; also 32, 44, 56"),
    Student("wrn-16-1", "wide ResNet, 0.17 M parameters; any wrn-D-K with D = 6 n + 4"),
    Student("wrn-16-2", "wide ResNet, 0.69 M parameters"),
    Student("wrn-10-1", "wide ResNet, 0.08 M parameters: the demo's student"),
)
