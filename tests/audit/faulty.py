"""Clients that claim what `dp_sgd` claims, and do not keep it."""

from dataclasses import replace

import numpy as np
import torch

from fedlora.clients.dp_sgd import DPSGD
from fedlora.privacy.mechanisms.bands import BandedGaussian, Correlated, coefficients


class NoNoise(DPSGD):
    """Clips, and adds no noise to speak of."""

    scale = 1e-6

    def fit(self, task, adapter, partition, settings, rng):
        quiet = replace(settings, noise_multiplier=self.scale * settings.noise_multiplier)
        return super().fit(task, adapter, partition, quiet, rng)


class TenthOfTheNoise(NoNoise):
    """Adds a tenth of the stated noise."""

    scale = 0.1


class FreshAccountant(DPSGD):
    """Starts a new accountant in each round, so that the epsilon it prints is one round's."""

    training = False

    def spends(self, num_examples, settings):
        event = super().spends(num_examples, settings)
        return event if self.training or settings.round == 1 else replace(event, steps=0)

    def fit(self, *told):
        self.training = True  # to itself it tells the truth: else it would be refused
        try:
            return super().fit(*told)
        finally:
            self.training = False


class OwnNoise(NoNoise):
    """Adds as much noise as is stated by itself, to what it sends; each kind draws it in a wrong way."""

    def draws(self, settings, rng, partition):
        """What the noise of a round is drawn from, by `standard_normal`."""
        return np.random.default_rng([rng.root, settings.round, partition.client])

    def noised(self, task, settings):
        """The tensors that get any."""
        return settings.send

    def fit(self, task, adapter, partition, settings, rng):
        update = super().fit(task, adapter, partition, settings, rng)
        drawn = self.draws(settings, rng, partition)
        scale = settings.lr * settings.noise_multiplier * settings.clip_norm / settings.batch_size
        scale *= settings.local_steps**0.5
        sent = dict(update.adapter)
        for name in self.noised(task, settings):
            sent[name] = (sent[name] + scale * drawn.standard_normal(sent[name].shape)).astype(np.float32)
        return replace(update, adapter=sent)


class OtherBands(DPSGD):
    """Pays for the bands that are asked for, and adds the noise of twice as many."""

    def mechanism(self, num_examples, settings):
        made = super().mechanism(num_examples, settings)
        return _Twice(**vars(made))


class _Twice(BandedGaussian):
    def noise(self, draws):
        return Correlated(
            replace(self, coefficients=coefficients(2 * self.bands, 60)), draws.past, draws.client, draws.first
        )


class SameNoise(OwnNoise):
    """A client's noise is drawn once, and added in every round."""

    def draws(self, settings, rng, partition):
        return np.random.default_rng([rng.root, partition.client])


class NoiseTwice(OwnNoise):
    """Each noise is added in two rounds."""

    def draws(self, settings, rng, partition):
        return np.random.default_rng([rng.root, (settings.round + 1) // 2, partition.client])


class BareHead(OwnNoise):
    """The classifier gets no noise."""

    def noised(self, task, settings):
        return [name for name in settings.send if task.layout[name].role != "head"]


class LowBits(OwnNoise):
    """Seeds of 64 bits that differ, for a generator that takes the low 32: the clients of a round share noise."""

    def draws(self, settings, rng, partition):
        return Twister((partition.client << 32) + settings.round)


class Twister:
    """Torch's generator on a CPU."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def standard_normal(self, shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).numpy()
