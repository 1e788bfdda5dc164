"""An LSTM over frames: a 2-D ResNet on every frame, then stacked LSTM layers, of whose outputs the last count most.

    frames --2-D network--> frames_BTF --LSTM--> outputs_BTD --mean with weights g--> features_BD --fc--> logits_BK

    resnet50-lstm           two layers of 512 cells

The frame network has torchvision's parameter names, and the LSTM is called `lstm`. Output t of 1..T has the weight
g = t / T, which grows linearly from 0 before the first frame to 1 at the last. The paper applies g to the predictions
of the frames, after the softmax. Here it is applied to the outputs, so that a clip has one row of features. As the
classifier is linear, a clip's scores are the weighted mean of its frames' scores before the softmax.

The paper stacks five layers of 512 cells on AlexNet or GoogLeNet, and takes one frame per second of a million videos.
Two are the default here, as in Google's own models for YouTube-8M, because a clip is only 16 consecutive frames.
`lstm_layers=5` is the paper's depth.

Sources: Ng et al., "Beyond Short Snippets: Deep Networks for Video Classification", CVPR 2015, section 3.2;
google/youtube-8m, frame_level_models.py.

Shapes: B clips, C channels, T frames, H height, W width, F features of a frame, D cells of an LSTM layer, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from p3d.networks.resnet import ResNet, ResNetConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LSTMConfig(ResNetConfig):
    """A 2-D ResNet with `lstm_layers` layers of `hidden` cells on its frames. Raises ValueError for invalid values."""

    hidden: int = 512
    lstm_layers: int = 2

    def __post_init__(self) -> None:
        ResNetConfig.__post_init__(self)  # super() refers to the class as it was before dataclass added __slots__
        if self.spacetime:
            raise ValueError(f"{self.name} has an LSTM over frames, so its convolutions must be 2-D")
        if self.hidden < 1 or self.lstm_layers < 1:
            raise ValueError(f"an LSTM needs at least one: {self.hidden = }, {self.lstm_layers = }")

    @property
    def layers(self) -> int:
        """Convolutions, LSTM layers and the classifier on the longest path, no projections."""
        return 1 + 3 * sum(self.blocks) + self.lstm_layers + 1

    def build(self) -> ResNetLSTM:
        return ResNetLSTM(self)


class ResNetLSTM(ResNet):
    """The 2-D network on every frame; a clip's features are the weighted mean of the LSTM's outputs."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.lstm = nn.LSTM(self.feature_dim, config.hidden, config.lstm_layers, batch_first=True)
        self.feature_dim = config.hidden
        self.fc = nn.Linear(config.hidden, config.num_classes)

    def features(self, clips_BCTHW: Tensor) -> Tensor:
        """The mean of the last layer's outputs, weighted by t / T at frame t of 1..T, (B, D); any T."""
        frames_BTF = self.frame_features(clips_BCTHW)
        if self.training:
            outputs_BTD, _ = self.lstm(frames_BTF)
        else:  # one clip at a time, because in a product of several rows the bits may depend on a row's position
            outputs_BTD = torch.cat([self.lstm(clip_1TF)[0] for clip_1TF in torch.split(frames_BTF, 1)])
        g_T1 = torch.arange(1, frames_BTF.shape[1] + 1, device=frames_BTF.device, dtype=frames_BTF.dtype).unsqueeze(1)
        features_BD: Tensor = (outputs_BTD * (g_T1 / g_T1.sum())).sum(dim=1)
        return features_BD
