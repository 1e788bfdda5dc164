"""The network of a training: the weights it starts from, what is frozen, the optimiser and the learning rate.

The paper's start (section 4): every filter of a 2-D ImageNet ResNet, temporal filters from N(0, 0.001^2), and all batch
normalisations frozen but the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import p3d.weights
from p3d import zoo
from p3d.jobs.training.options import TrainOptions
from p3d.names import RANDOM
from p3d.networks.network import Network
from p3d.pipeline.errors import InputError
from p3d.weights import ImportOptions, Weights
from p3d.weights.record import COUNTER, assemble, to_train
from p3d.weights.seeded import normal

CLASSIFIER_STD = 0.01  # of new classifiers: the deploy prototxt's filler is smaller, and learns as well
WARM_UP = 0.25  # share of a one-cycle training in which the rate grows
SHORTEST_CYCLE = 8  # steps


def start_from(
    init: str, model: str | None, graph: str | None, class_names: tuple[str, ...], options: TrainOptions
) -> Weights:
    """The weights that a training starts from, with a classifier of these classes. InputError if they do not fit.

    `init` is a file of any known format, or random:SEED. A classifier of the same class names is kept, and any other
    is replaced by small random numbers that the seed of the training decides.
    """
    try:
        if init.startswith(RANDOM):
            if model is None:
                raise InputError("random weights fit any network: choose one with --model (see `p3d models`)")
            found = p3d.weights.resolve(init, name=model, graph=graph, num_classes=len(class_names))
        else:
            found = _from_file(init, model, graph, options.seed)
    except ValueError as error:
        raise InputError(str(error)) from None
    if found.config.in_channels != 3:
        raise InputError(
            f"{found.name} takes optical flow, which p3d does not compute from a video; use an RGB network"
        )
    return with_classes(found, class_names, options.seed)


def _from_file(init: str, model: str | None, graph: str | None, seed: int) -> Weights:
    file = p3d.weights.identify(init)
    if file.format != "resnet" or (model in zoo.BASELINES and model not in zoo.LSTM_NAMES):
        return file.load(ImportOptions(name=model, graph=graph))
    if model not in zoo.LSTM_NAMES:
        graph = graph or "caffe"  # in the port's graph some temporal filters of zero would get no gradient
    return file.load(ImportOptions(name=model, graph=graph, temporal="gaussian", seed=seed))


def with_classes(weights: Weights, class_names: tuple[str, ...], seed: int) -> Weights:
    """The same weights with a classifier of these classes, drawn from the seed unless the names are the same."""
    if weights.class_names == class_names:
        return weights
    config = replace(weights.config, num_classes=len(class_names))
    layer = weights.network.classifier
    state = {key: value for key, value in weights.network.state_dict().items() if not key.endswith(COUNTER)}
    shape = (len(class_names), *state[f"{layer}.weight"].shape[1:])
    drawn = CLASSIFIER_STD * normal(f"{layer}.weight", shape, seed)
    state[f"{layer}.weight"] = torch.from_numpy(drawn).float()
    state[f"{layer}.bias"] = torch.zeros(len(class_names))
    origin = f"{weights.origin}, with a new classifier of seed {seed}"
    return assemble("the start", config, weights.recipe, state, class_names=class_names, origin=origin)


def what_is_frozen(options: TrainOptions, init: str) -> str:
    """What the option `freeze` comes to: none, bn, all-bn or backbone."""
    if options.freeze != "auto":
        return options.freeze
    return "none" if init.startswith(RANDOM) else "bn"


def network_of(start: Weights, options: TrainOptions, freeze: str) -> Network:
    """A network to train, with the weights of the start, the dropout of the options, and its frozen parts."""
    network = to_train(start, options.dropout)
    if freeze == "backbone":
        network.requires_grad_(False)
        network.get_submodule(network.classifier).requires_grad_(True)
    for norm in frozen_norms(network, freeze):
        norm.requires_grad_(False)
    return network


def pad_frames_first(network: nn.Module) -> None:
    """Pad clips with black frames before each 3-D convolution, and not within it. The network computes the same.

    With PyTorch 2.13, a CPU's gradients of 3-D convolutions in bf16 are wrong where there are two frames and a padding:
    they contain whatever was in memory before. The third stage of a P3D has such a convolution.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv3d) and module.padding[0]:
            n_frames, height, width = map(int, module.padding)
            module.padding = (0, height, width)
            around = (0, 0, 0, 0, n_frames, n_frames)
            module.register_forward_pre_hook(lambda _, inputs, around=around: nn.functional.pad(inputs[0], around))


def frozen_norms(network: Network, freeze: str) -> Iterator[nn.Module]:
    """The batch normalisations that keep their statistics, scale and shift."""
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and freeze != "none" and not (name == network.stem_norm and freeze == "bn"):
            yield module


def in_training_mode(network: Network, freeze: str) -> None:
    """Switch to training mode, except for frozen normalisations, which use the statistics of the start."""
    network.train()
    for norm in frozen_norms(network, freeze):
        norm.eval()


def optimizer_of(network: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """The optimiser of all parameters that are not frozen."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if options.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=options.lr, weight_decay=options.weight_decay)
    return torch.optim.SGD(trained, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay)


def schedule_of(optimizer: torch.optim.Optimizer, options: TrainOptions) -> Any:
    """The schedule of the learning rate, to be stepped after each training step."""
    if options.schedule == "one-cycle":
        # one more, as torch refuses the step after the last; with very few steps, it divides by zero
        n_steps = max(options.steps + 1, SHORTEST_CYCLE)
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, n_steps, pct_start=WARM_UP)
    every = options.lr_every if options.schedule == "steps" else options.steps + 1
    return torch.optim.lr_scheduler.StepLR(optimizer, every, gamma=0.1)


def trained(start: Weights, state: Mapping[str, Tensor], origin: str) -> Weights:
    """The weights of a training, from the state of its network."""
    kept = {key: value for key, value in state.items() if not key.endswith(COUNTER)}
    return assemble("the training", start.config, start.recipe, kept, class_names=start.class_names, origin=origin)
