"""Clients that claim what `dp_sgd` claims, and do not keep it."""

from dataclasses import replace

from fedlora.clients.dp_sgd import DPSGD


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

    def spends(self, num_examples, settings):
        event = super().spends(num_examples, settings)
        return event if settings.round == 1 else replace(event, steps=0)
