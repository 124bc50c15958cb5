"""Signs that a decomposition goes wrong, in the numbers that its log has anyway.

`Watchdog.see` is handed every record of the log, and gives the alarms that it raises. What each of them looks for is a
row of `SIGNS`; a sign has to stay for PATIENCE records, or be there in the first or the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median

from spdcli.engine.fit import Record
from spdcli.engine.tables import LOSSES

PATIENCE = 2  # records in a row that show a sign, before it is believed
EARLY = 100  # steps, or a tenth of the run if that is more, in which slices and gates may still be anything
FULL_LOSS = 0.9  # of what the loss is with every slice off: as good as nothing
WELL_BEGUN, LOST = 0.2, 0.5  # of it: what began below the first is lost at the second
ALWAYS_ON = 0.9  # share of what is on that is on everywhere: importances tell nothing apart
MISSED = 0.2  # of the loss with every slice off, from which on slices are missed where none is on
CROWDED = 0.9  # share of active slices in the last block
FEW_BLOCKS = 3  # with fewer, the last block holds most of what there is
FEW_ON = 0.05  # share of slices, below which it is minimality that a bad loss comes from
BORN_OFF = 0.05  # share of slices that are on in the first step, below which gates begin too low
WINDOW = 100  # records that are remembered
USUAL = 3  # of them, from which on it is known what is usual
SPIKE = 1000  # times the usual norm of the gates' gradient: Adam's second moment remembers it for as many steps


@dataclass(frozen=True)
class Watched:
    """What the records of a run are held against.

    `steps` of the whole run; `all_off` the losses with every slice off (see `engine.all_off`); `slices` their number
    in all matrices, `blocks[m]` the block of matrix m; `gate_bias` is where gates start; `prune_step` as in
    `FitSettings`, `clipped` whether the gates' gradient is. `size` is the root mean square of U and V where training
    begins (None: not known), whose learning rate is `slice_rate` times that of the records.
    """

    steps: int
    all_off: Mapping[str, float]
    slices: int
    blocks: Mapping[str, int]
    gate_bias: float = 0.5
    prune_step: int | None = None
    clipped: bool = False
    size: float | None = None
    slice_rate: float = 1.0


@dataclass(frozen=True)
class Alarm:
    """One thing that the watchdog tells: which sign (a key of SIGNS), at which `step`, the number that shows it, in
    words, and the `setting` to change. `collapse`: the run will come to nothing as it is."""

    kind: str
    step: int
    value: float
    text: str
    setting: str
    collapse: bool

    def __str__(self) -> str:
        return f"{f'step {self.step}' if self.step else 'before step 1'}: {self.text}; {self.setting}"


@dataclass(frozen=True)
class Seen:
    """What a sign is read from: the run, its first record, its last ones, and the newest."""

    run: Watched
    first: Record
    past: list[Record]
    now: Record

    @property
    def early(self) -> bool:
        return self.now.step < max(EARLY, self.run.steps / 10)

    @property
    def on(self) -> float:
        """Active slices at a position, over all matrices."""
        return sum(self.now.active.values())

    @property
    def judged_loss(self) -> tuple[str, float, float] | None:
        """The reconstruction loss that asks most for its masks to be right: its name, its value and that with every
        slice off. None where there is none to compare."""
        order = [(source, scope) for scope in ("all", "subset", "each") for source in ("importance", "stochastic")]
        cells = {(LOSSES[name].source, LOSSES[name].scope): name for name in self.now.losses if name in LOSSES}
        for cell in order:
            name = cells.get(cell)
            if name is not None and self.run.all_off.get(name, 0) > 0:
                return name, self.now.losses[name], self.run.all_off[name]
        return None


Reading = tuple[float, str, str]  # the number, what it says, the setting to change


def nothing_on(seen: Seen) -> Reading | None:
    """No slice of any matrix is active anywhere."""
    if seen.on > 0:
        return None
    before = [record for record in seen.past if sum(record.active.values()) > 0]
    pruned = seen.run.prune_step
    if sum(seen.first.active.values()) < BORN_OFF * seen.run.slices:
        setting = f"raise importance.gate_bias, which is {seen.run.gate_bias:g}"
    elif pruned is not None and before and seen.now.step >= pruned >= before[-1].step:
        setting = f"lower decompose.prune_below, by which step {pruned} switched slices off"
    else:
        setting = "lower losses.minimality"
    return 0.0, f"no slice is on anywhere, of {seen.run.slices}", setting


def born_off(seen: Seen) -> Reading | None:
    """Gates that are set to begin low are on almost nowhere in the first step."""
    if seen.now.step > 1 or seen.run.gate_bias >= 0 or not 0 < seen.on < BORN_OFF * seen.run.slices:
        return None
    text = f"{seen.on:.3g} of {seen.run.slices} slices are on at a position, and the others learn next to nothing"
    return seen.on / seen.run.slices, text, f"raise importance.gate_bias, which is {seen.run.gate_bias:g}"


def worse_than_none(seen: Seen) -> Reading | None:
    """The reconstruction loss is what it would be with every slice off, or has lost most of what it began with."""
    judged = seen.judged_loss
    if seen.early or judged is None:
        return None
    name, value, off = judged
    begun = seen.first.losses.get(name, off)
    if value < off * (LOST if begun < WELL_BEGUN * off else FULL_LOSS):
        return None
    setting = "lower losses.minimality" if seen.on < FEW_ON * seen.run.slices else "lower decompose.learning_rate"
    return (
        value / off,
        f"{name} is {value:.3g}; it began at {begun:.3g}, and is {off:.3g} with every slice off",
        setting,
    )


def rate_too_high(seen: Seen) -> Reading | None:
    """One step of Adam, which moves a number by about the learning rate, moves U and V by more than they are."""
    rate, size = seen.now.rate * seen.run.slice_rate, seen.run.size
    if size is None or rate <= size:
        return None
    text = f"a step moves the numbers of U and V by about {rate:.3g}, and their root mean square is {size:.3g}"
    return rate / max(size, 1e-30), text, "lower decompose.learning_rate"


def pruned_too_much(seen: Seen) -> Reading | None:
    """Pruning took most active slices, and the loss says that they are missed."""
    at, judged = seen.run.prune_step, seen.judged_loss
    before = [record for record in seen.past if record.step <= (at or 0)]
    if at is None or judged is None or not before or seen.now.step <= at:
        return None
    name, value, off = judged
    active, begun = sum(before[-1].active.values()), before[-1].losses.get(name, off)
    if not 0 < seen.on < active / 2 or value < max(2 * begun, MISSED * off):
        return None
    text = f"pruning at step {at} left {seen.on:.3g} of {active:.3g} active slices, and {name} went from {begun:.3g} to"
    return seen.on / active, f"{text} {value:.3g}", "lower decompose.prune_below"


def unfaithful(seen: Seen) -> Reading | None:
    """U V is further from W than no slices at all are."""
    for name in ("faithfulness", "relative_faithfulness"):
        value, off = seen.now.losses.get(name, 0.0), seen.run.all_off.get(name, 0.0)
        if not seen.early and 0 < off <= value:
            return value / off, f"{name} is {value:.3g}, and {off:.3g} without slices", "lower decompose.learning_rate"
    return None


def dead_matrices(seen: Seen) -> Reading | None:
    """Half of the matrices have no active slice, and the loss says that they are missed."""
    dead = [name for name, count in seen.now.active.items() if count == 0]
    judged = seen.judged_loss
    if seen.early or judged is None or not seen.on or 2 * len(dead) < len(seen.now.active):
        return None
    name, value, off = judged
    if value < MISSED * off:
        return None
    shown = ", ".join(dead[:3]) + (" ..." if len(dead) > 3 else "")
    text = f"all slices of {len(dead)} of {len(seen.now.active)} matrices are dead ({shown}), and {name} is {value:.3g}"
    return len(dead) / len(seen.now.active), text, "lower losses.minimality, or decompose.learning_rate"


def always_on(seen: Seen) -> Reading | None:
    """In the second half of the run slices are on at every position, or at none."""
    if seen.early or 2 * seen.now.step < seen.run.steps or not seen.on:
        return None
    share = sum(seen.now.always_on.values()) / seen.on
    if share < ALWAYS_ON:
        return None
    text = f"of the {seen.on:.3g} slices that are on at a position {share:.0%} are on everywhere"
    return share, text, "raise losses.minimality, or decompose.steps"


def blind_gates(seen: Seen) -> Reading | None:
    """As `always_on`, and the slices that are on do not do what the target does."""
    reading, judged = always_on(seen), seen.judged_loss
    if reading is None or judged is None or judged[1] < MISSED * judged[2]:
        return None
    name, value, off = judged
    text = f"{reading[1]}, and {name} is {value:.3g}, {value / off:.0%} of what it is with every slice off"
    return reading[0], text, "lower decompose.learning_rate"


def crowded_last_block(seen: Seen) -> Reading | None:
    """Nearly all active slices are in the last of several blocks, where slices can write answers of their own."""
    last = max(seen.run.blocks.values())
    if seen.early or len(set(seen.run.blocks.values())) < FEW_BLOCKS or not seen.on:
        return None
    share = sum(count for name, count in seen.now.active.items() if seen.run.blocks[name] == last) / seen.on
    if share <= CROWDED:
        return None
    return share, f"{share:.0%} of the active slices are in the last block, {last}", "leave it out of slices.matrices"


def still_gates(seen: Seen) -> Reading | None:
    """The importance functions get no gradient at all."""
    if seen.now.gradients["gates"] > 0 or not seen.on:
        return None
    return 0.0, "the gradient of all gates is 0: importances stay as they are", "lower importance.gate_bias"


def gradient_spike(seen: Seen) -> Reading | None:
    """The gradient of the gates is far above its usual norm, and nothing clips it."""
    norms = [record.gradients["gates"] for record in seen.past]
    if seen.run.clipped or len(norms) < USUAL or not median(norms):
        return None
    norm, usual = seen.now.gradients["gates"], median(norms)
    if norm <= SPIKE * usual:
        return None
    return (
        norm / usual,
        f"the norm of the gates' gradient is {norm:.2g}, usually {usual:.2g}",
        "set decompose.clip_gates",
    )


@dataclass(frozen=True)
class Sign:
    """Something that is seen in a record: `read` gives the number that shows it, or None. `collapse`: a lower learning
    rate or another setting is needed for the run to come to anything; `patience`: records in a row that must show it;
    `of_the_rate`: a lower learning rate mends it even where it is seen in the first step.
    """

    read: Callable[[Seen], Reading | None]
    collapse: bool = False
    patience: int = PATIENCE
    of_the_rate: bool = False


SIGNS: dict[str, Sign] = {
    "rate_too_high": Sign(rate_too_high, collapse=True, patience=1, of_the_rate=True),
    "nothing_on": Sign(nothing_on, collapse=True),
    "born_off": Sign(born_off),
    "worse_than_none": Sign(worse_than_none, collapse=True),
    "pruned_too_much": Sign(pruned_too_much, collapse=True),
    "unfaithful": Sign(unfaithful, collapse=True),
    "dead_matrices": Sign(dead_matrices),
    "always_on": Sign(always_on),
    "blind_gates": Sign(blind_gates, collapse=True),
    "crowded_last_block": Sign(crowded_last_block),
    "still_gates": Sign(still_gates),
    "gradient_spike": Sign(gradient_spike, patience=1),
}


@dataclass
class Watchdog:
    """Sees the records of one run in their order; tells every sign once."""

    run: Watched
    first: Record | None = None
    past: list[Record] = field(default_factory=list)
    shown: dict[str, int] = field(default_factory=dict)  # how many records in a row have shown a sign
    alarmed: set[str] = field(default_factory=set)

    def see(self, record: Record) -> list[Alarm]:
        """The alarms that this record raises."""
        self.first = self.first or record
        seen, alarms = Seen(self.run, self.first, self.past, record), []
        for kind, sign in SIGNS.items():
            reading = sign.read(seen)
            self.shown[kind] = 0 if reading is None else self.shown.get(kind, 0) + 1
            enough = self.shown[kind] >= sign.patience or record.step in (1, self.run.steps)
            if reading is not None and enough and kind not in self.alarmed:
                self.alarmed.add(kind)
                alarms.append(Alarm(kind, record.step, *reading, sign.collapse))
        self.past = [*self.past, record][-WINDOW:]
        return alarms

    def anew(self) -> Watchdog:
        """A watchdog of the same run that has seen nothing but its beginning."""
        return Watchdog(self.run, self.first)

    @property
    def well(self) -> bool:
        """Whether the newest record shows no sign of a collapse, believed or not, so that one may go back to it."""
        return not any(count for kind, count in self.shown.items() if SIGNS[kind].collapse)
