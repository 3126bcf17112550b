"""What becomes of tensors on their way between the server and a client, where a scenario compresses them.

Down: a client trains from what arrives. Up: it sends its change since then, noise of differential privacy
included, so that rounding is post-processing, and what top_k keeps back is a function of noised changes alone; the
server adds the change to its own exact tensors. The rounding is drawn from the scenario's seed, at sites too: it
hides nothing, and a deployed run rounds as the simulated one did.
"""

from dataclasses import replace

import numpy as np

from fedlora import wire
from fedlora.adapter import Instruction, Tensor, Update
from fedlora.compression import Codec
from fedlora.privacy.mechanisms import central
from fedlora.rounds.checkpoint import Personal
from fedlora.scenario import Masked, Rounded, Scenario, TopK
from fedlora.seeding import generator
from fedlora.strategy import Strategy


class Transport:
    """Both ends of the way.

    Attributes:
        used: whether anything is compressed.
        up, down: how; None where float32 travels.
    """

    def __init__(self, scenario: Scenario, strategy: Strategy, left_out: Personal | None = None) -> None:
        """For a run.

        Args:
            scenario: says what is compressed.
            strategy: of the run.
            left_out: where clients keep what top_k did not send; None on a server.
        """
        told = scenario.compression
        self.seed, self.left_out = scenario.seed, left_out
        self.up, self.down = (_codec(told.up), _codec(told.down)) if told else (None, None)
        self.used = self.up is not None or self.down is not None
        self._changes = type(strategy).reply is Strategy.reply  # else replies are no later value of what was sent

    def packing_down(self, instruction: Instruction, rank: int) -> wire.Packing | None:
        """How an instruction is written for clients of a rank: the same for all of them."""
        path = (instruction.round, "down", rank, instruction.trip)
        return None if self.down is None else (self.down, generator(self.seed, *path))

    def packing_up(self, instruction: Instruction, client: int) -> wire.Packing | None:
        """How a client's update is written."""
        path = (instruction.round, client, "rounding", instruction.trip)
        return None if self.up is None else (self.up, generator(self.seed, *path))

    def received(self, instruction: Instruction, rank: int) -> Instruction:
        """An instruction as clients of a rank get it."""
        packing = self.packing_down(instruction, rank)
        if packing is None:
            return instruction
        return replace(instruction, adapter=wire.from_arrays(wire.to_arrays(instruction.adapter, packing)))

    def outgoing(self, update: Update, received: Instruction) -> Update:
        """A client's update with what it writes instead of its tensors.

        What top_k left out before is added, and what it leaves out now is kept.
        """
        if not self.used:
            return update
        (client,), round = update.clients, received.round
        changes = {n: t - self._start(n, t, received) for n, t in update.adapter.items()}
        if self.up is not None and self.up.kind == "top_k" and self.left_out is not None:
            before = self.left_out.load(client, before=round)
            changes = {n: t + before[n] if n in before else t for n, t in changes.items()}
            sent = wire.from_arrays(wire.to_arrays(changes, self.packing_up(received, client)))
            self.left_out.save(client, round, {**before, **{n: t - sent[n] for n, t in changes.items()}})
        return replace(update, adapter=changes)

    def arrived(self, update: Update, instruction: Instruction) -> Update:
        """An update with the tensors that the server makes of what a client wrote.

        Where clients are protected whole the change is clipped once more: rounding may have made it longer.

        Args:
            update: as it came over the wire.
            instruction: as the server holds it, at the client's rank.
        """
        if not self.used:
            return update
        adapter = {n: t + self._start(n, t, instruction) for n, t in update.adapter.items()}
        update = replace(update, adapter=adapter)
        if (bound := instruction.config.get(central.CLIP_NORM)) is None:
            return update
        clipped = central.clip(update, instruction.adapter, bound, share_metrics=True)
        return replace(clipped, metrics=update.metrics)

    def passed(self, update: Update, instruction: Instruction) -> Update:
        """Over the wire, in a simulation: from `outgoing` to what `arrived` takes."""
        packing = self.packing_up(instruction, update.clients[0])
        if packing is None:
            return update
        return replace(update, adapter=wire.from_arrays(wire.to_arrays(update.adapter, packing)))

    def _start(self, name: str, tensor: Tensor, instruction: Instruction) -> Tensor | np.float32:
        """What a change is a change of; nothing where the server sent no such tensor."""
        start = instruction.adapter.get(name) if self._changes else None
        return np.float32(0) if start is None or start.shape != tensor.shape else start


def _codec(told: Rounded | TopK | Masked | None) -> Codec | None:
    return None if told is None else Codec(told.kind, getattr(told, "share", 1.0))
