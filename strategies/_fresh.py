"""Starting over in the middle of a run: what of a model is fresh again, and what stays as it is."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cl_lab.protocols import Learner
from cl_lab.records import State


def fresh_weights(first: Mapping[str, Tensor], learner: Learner) -> State:
    """The weights to start from: trainable parameters and their layers' statistics as in ``first``, others as they are.

    So what is frozen stays, whenever it was, and classes that a growing head has met stay possible.
    """
    model = learner.replica()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = {name.rpartition(".")[0] for name in names}
    names |= {name for name, _ in model.named_buffers() if name.rpartition(".")[0] in layers}
    return model.state_dict() | {name: value for name, value in first.items() if name in names}
