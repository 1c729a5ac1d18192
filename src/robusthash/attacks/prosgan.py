"""ProS-GAN and TA-DCH: nets that learn the code of a target, and a generator that moves images to it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from robusthash.attacks.base import Attack, Guide, Loss
from robusthash.attacks.generator import Generator, Planes, TargetNet, target_loss
from robusthash.attacks.generator_file import (
    GeneratorFile,
    generator_key,
    read,
    require_attack,
    require_match,
    require_same,
)
from robusthash.attacks.generator_training import (
    GeneratorSchedule,
    GeneratorTask,
    change_weight,
    seeded,
    train_generator,
)
from robusthash.attacks.guides import Anchor, known
from robusthash.attacks.losses import Agreement
from robusthash.attacks.painting import Generated, Painted, painted
from robusthash.attacks.threat_model import Threat, image_threat
from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.core.runtime import Draws, show_progress
from robusthash.core.types import Batch, Goal, HashOutput, Reference
from robusthash.data.base import RetrievalData
from robusthash.models.encoding import state_digest
from robusthash.models.hasher import Hasher

_PUBLISHED = {"width": 64, "hidden": 4096, "rate": 1e-4}


class TargetNets(nn.Module):
    """The nets of a targeted generator."""

    def __init__(self, classes: int, bits: int, texts: int, hidden: int, width: int, blocks: int) -> None:
        super().__init__()
        self.target = TargetNet(classes, bits, texts, hidden)
        self.planes = Planes(self.target.features.out_features, width)
        self.generator = Generator(3, width, blocks)


@register("attack-guide", "generator", paper="ProS-GAN, CVPR 2021", evidence="paper+code", targeted=True)
@dataclass(frozen=True)
class TargetGenerator(Guide):
    """Prototypes of targets learned from the victim's training codes, and a generator towards them.

    Args:
        epochs, rate, reconstruction: of the generator (``GeneratorSchedule``).
        hidden, width, blocks: sizes of the nets; 4096, 64 and 6 published.
        fit_steps: of the prototypes, 64 targets each; 30,000 published.
        pairs_weight, quantisation: of the prototypes' loss (``target_loss``).
        texts: a target is a label set and a text (TA-DCH), else a label set alone.
        bounded: the generator gives a change of at most eps; else an image, as published, that the evaluator
            projects.
        file: where the generator is kept, and trained on after a stop; in memory alone without it.
        source: of a transferred generator the digest of its nets; "" for the victim's own.
    """

    epochs: int = 20
    rate: float = 1e-3
    reconstruction: float = 100.0
    hidden: int = 4096
    width: int = 64
    blocks: int = 6
    steps: int = 30_000
    pairs_weight: float = 1.0
    quantisation: float = 1e-4
    texts: bool = False
    bounded: bool = True
    source: str = ""
    file: Path | None = field(default=None, compare=False)
    eps: float = field(default=8 / 255, compare=False)  # of the threat, which results carry
    nets: TargetNets | None = field(default=None, compare=False)
    target_texts: tuple[Tensor, Tensor] | None = field(default=None, compare=False)
    fit_steps: int = field(default=0, compare=False)
    fit_items: int = field(default=0, compare=False)
    label_codes = True
    learns = True

    @property
    def substitutes(self) -> bool:  # type: ignore[override]
        """A transferred generator needs no victim."""
        return bool(self.source)

    @property
    def made_by(self) -> str:
        """The attack that a file of this generator names."""
        return "ta-dch" if self.texts else "pros-gan"

    @property
    def schedule(self) -> GeneratorSchedule:
        return GeneratorSchedule(self.epochs, self.rate, reconstruction=self.reconstruction)

    def __post_init__(self) -> None:
        if min(self.hidden, self.width, self.steps) < 1:
            raise ValueError(f"hidden, width, fit_steps from 1: {self.hidden}, {self.width}, {self.steps}")
        _ = self.schedule  # or refused

    def under(self, threat: Threat) -> TargetGenerator:
        return replace(self, eps=threat.balls["image"].eps)

    def at_most(self, steps: int) -> TargetGenerator:
        return replace(self, epochs=min(steps, self.epochs), steps=min(self.steps, 100 * steps))

    def fit_size(self, items: int) -> int:
        return self.epochs * items  # the codes of targets, which come before, take little

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Painted:
        if goal.labels is None:
            raise ValueError("a targeted generator needs goal labels: use labelled data")
        if self.nets is None:
            raise ValueError("this generator is not trained yet: call attack.fit(...) on the victim")
        images = batch.inputs["image"]
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            small = images.float()
            prototype = self.nets.target(goal.labels.float(), self._texts(batch, goal, draws))
            planes = self.nets.planes(prototype.features, small.shape[2:])
            output = self.nets.generator(small, planes)
            result = painted(output, small, self.eps if self.bounded else None).to(images)
        if not torch.isfinite(result).all():
            raise FloatingPointError("the generator's images are NaN or infinite")
        codes = prototype.code[:0] if self.source else sign(prototype.code)
        return Painted(codes, inputs={"image": result})

    def _texts(self, batch: Batch, goal: Goal, draws: Draws) -> Tensor | None:
        """(B, V) a training text with the target's labels for each query; None where texts play no part."""
        if self.target_texts is None or goal.labels is None:
            return None
        texts, labels = self.target_texts
        voters = Anchor._voters(goal.labels, labels)
        rank = draws.within("text").uniform(batch.ids, (len(texts),)).masked_fill(~voters, 2.0)
        return texts[rank.argmin(1)]

    def fitted(
        self, victim: Hasher, data: RetrievalData, reference: Reference | None, draws: Draws
    ) -> TargetGenerator:
        """The guide with nets trained on this victim, or read from the file.

        Raises:
            ValueError: a file of another victim, size or budget; no images, labels or texts to learn from.
        """
        labels = self._require(data)
        nets = self._new(labels.shape[1], victim.bits, data, draws).to(victim.device)
        guide = replace(self, nets=nets, fit_items=len(data.train))
        if self.texts:
            texts = data.train.batch(torch.arange(len(data.train))).inputs["text"].float()
            guide = replace(guide, target_texts=(texts.to(victim.device), labels.to(victim.device)))
        if self.source:
            return guide._transferred(data, victim)
        expected = generator_key(self.made_by, victim, data, self.eps)
        if self.file is not None and self.file.is_file():
            require_same(self.file, read(self.file)["header"], expected)
        own = {
            "options": str(replace(self, eps=0.0, file=None)),
            "bounded": self.bounded,
            "epochs": self.epochs,
        }
        file = None if self.file is None else GeneratorFile(self.file, {**expected, **own})
        codes, code_labels, _ = known(reference, Goal(labels, 1))
        training = TargetedTraining(guide, codes, code_labels, draws)
        steps = train_generator(training, victim, data, self.schedule, draws, file, training.prototypes)
        nets.requires_grad_(False)
        return replace(guide, fit_steps=steps + self.steps)

    def _require(self, data: RetrievalData) -> Tensor:
        """The training labels; refused where the data lack what the generator learns from."""
        if data.train.labels is None:
            raise ValueError(f"{data.name} has no training labels, which a targeted generator learns from")
        if "image" not in data.modalities or len(data.image_size) != 2:
            raise ValueError(f"a generator paints pixels; {data.name} has {list(data.modalities)} without")
        if self.texts and "text" not in data.modalities:
            raise ValueError(f"TA-DCH needs texts, and {data.name} has no texts; take pros-gan")
        return data.train.labels

    def _new(self, classes: int, bits: int, data: RetrievalData, draws: Draws) -> TargetNets:
        with seeded(draws.within("nets")):
            width = (data.vocabulary or 0) if self.texts else 0
            return TargetNets(classes, bits, width, self.hidden, self.width, self.blocks)

    def _transferred(self, data: RetrievalData, victim: Hasher) -> TargetGenerator:
        """The guide with the nets of the file, made for another model on the same kind of data."""
        assert self.file is not None
        stored, here = read(self.file), generator_key(self.made_by, victim, data, self.eps)
        header = stored["header"]
        if stored["epoch"] < header["epochs"]:
            raise ValueError(
                f"{self.file} holds epoch {stored['epoch']} of {header['epochs']}, its training was stopped; "
                "go on with the evaluation of its own victim that began it, then transfer it"
            )
        if header["victim"] == here["victim"]:
            raise ValueError(f"{self.file} was trained for this very victim; leave out transfer")
        for key in ("image", "labels", "eps"):
            require_match(self.file, header, here, key)
        bits, state = header["bits"], stored["state"]["nets"]
        nets = self._new(header["labels"], bits, data, Draws(0)).to(victim.device)
        try:
            nets.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"{self.file} holds nets of other sizes; give the width and hidden that it was made with"
            ) from error
        return replace(self, nets=nets.requires_grad_(False), target_texts=self.target_texts, fit_items=0)


class TargetedTraining:
    """A targeted generator in training: targets drawn by item and epoch, loss 5 (1 - mean h' b_t)."""

    CODE = 5.0
    BATCH = 64

    def __init__(self, guide: TargetGenerator, codes: Tensor, labels: Tensor, draws: Draws) -> None:
        assert guide.nets is not None
        self.guide, self.nets = guide, guide.nets
        self.codes, self.labels, self.draws = codes, labels, draws.within("prototypes")
        if guide.target_texts is None:
            sets = torch.unique(labels.cpu(), dim=0)
            self.sets, self.texts = sets[sets.sum(1) > 0].to(labels), None
        else:
            self.texts, self.sets = guide.target_texts

    def prototypes(self) -> None:
        """Learn the codes of all targets first; then the generator alone learns."""
        rate, steps = 1e-4, self.guide.steps
        optimiser = torch.optim.Adam(self.nets.target.parameters(), rate, betas=(0.5, 0.999))
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = rate * 0.1 ** ((2 * step >= steps) + (4 * step >= 3 * steps))
            rows = self._random_rows(self.draws.within(step), torch.arange(self.BATCH))
            with torch.enable_grad():
                prototype = self.nets.target(
                    self.sets[rows], None if self.texts is None else self.texts[rows]
                )
                weights = self.guide.pairs_weight, self.guide.quantisation
                loss = target_loss(prototype, self.sets[rows], self.codes, self.labels, *weights)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            show_progress(step + 1, steps, "steps of the target codes")

    def _random_rows(self, draws: Draws, ids: Tensor) -> Tensor:
        return (draws.uniform(ids, ()) * len(self.sets)).long().to(self.sets.device)

    def task(self, batch: Batch, draws: Draws) -> GeneratorTask:
        rows = self._random_rows(draws.within("targets"), batch.ids)
        with torch.no_grad():
            prototype = self.nets.target(self.sets[rows], None if self.texts is None else self.texts[rows])
        planes = self.nets.planes(prototype.features, batch.inputs["image"].shape[2:])
        target, assertion = sign(prototype.code), batch.labels
        assert assertion is not None

        def code_loss(output: HashOutput) -> Tensor:
            return self.CODE * (1 - (output.relaxed() * target).mean())

        return GeneratorTask(planes, assertion, self.sets[rows], code_loss)

    def paint(self, images: Tensor, planes: Tensor) -> Tensor:
        bound = self.guide.eps if self.guide.bounded else None
        return painted(self.nets.generator(images, planes), images, bound)


def generator_attack(
    name: str, guide: TargetGenerator, eps: float | None, generator: str | None, transfer: bool
) -> Attack:
    """The attack of a guide, its generator kept in a file or transferred from one."""
    if transfer and generator is None:
        raise ValueError("transfer: true needs the file of a generator that was trained on another model")
    loss: Loss = Agreement()
    file = None if generator is None else Path(generator)
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise ValueError(f"generator {generator!r} is no file in a folder that exists; name one, as gen.pt")
    if transfer and file is not None:
        stored = read(file)
        header, source = stored["header"], state_digest(stored["state"]["nets"])
        require_attack(file, header, guide.made_by)
        # as it was trained, whatever is said
        guide = replace(guide, source=source, bounded=header["bounded"])
        name = f"{name} from {header['victim'][:8]}"
    threat = image_threat(8 / 255 if eps is None else eps, knowledge="T" if transfer else "W1")
    return Attack(name, replace(guide, file=file), loss, Generated(), threat, targeted=True)


@register(
    "attack",
    "pros-gan",
    paper="Wang et al., CVPR 2021",
    evidence="paper+code",
    modality="image",
    targeted=True,
    state="measured",
    published={**_PUBLISHED, "epochs": 100, "fit_steps": 30_000, "reconstruction": 100.0},
)
def pros_gan(
    eps: float | None = None,
    epochs: int = 20,
    width: int = 16,
    hidden: int = 512,
    fit_steps: int = 1000,
    rate: float = 1e-3,
    reconstruction: float | None = None,
    bounded: bool = True,
    generator: str | None = None,
    transfer: bool = False,
) -> Attack:
    """ProS-GAN: one pass of a generator towards the code that a prototype net learned for the target labels.

    ``generator`` is a file that keeps it, tied to the victim; ``transfer: true`` uses one that was trained on
    another model. 100 epochs, width 64, rate 1e-4, 30,000 ``fit_steps`` of the prototypes in the paper.

    Differs: the generator learns within eps, and its change weighs nothing in the loss (``bounded: false``:
    an image and ``reconstruction`` 100, as published; the evaluator projects it); targets share no label with
    the query in evaluation (published: any label set); nearest upsampling and instance norm in place of
    transposed convolutions, which need no size of image.
    """
    weight = change_weight(reconstruction, bounded, published=100.0)
    guide = TargetGenerator(epochs, rate, weight, hidden, width, steps=fit_steps, bounded=bounded)
    return generator_attack("pros-gan", guide, eps, generator, transfer)


@register(
    "attack",
    "ta-dch",
    paper="Wang et al., IEEE TCSVT 2023",
    evidence="paper+code",
    modality="cross-modal",
    targeted=True,
    state="measured",
    published={**_PUBLISHED, "epochs": 50, "fit_steps": 8000, "reconstruction": 150.0},
)
def ta_dch(
    eps: float | None = None,
    epochs: int = 20,
    width: int = 16,
    hidden: int = 512,
    fit_steps: int = 1000,
    rate: float = 1e-3,
    reconstruction: float | None = None,
    bounded: bool = True,
    generator: str | None = None,
    transfer: bool = False,
) -> Attack:
    """TA-DCH: ProS-GAN on pairs: the prototype is learned of the target's labels and text, fused by gates.

    ``generator`` and ``transfer`` as of ``pros-gan``. The paper trains prototypes for 50 epochs of 10,000
    items (about 8,000 steps) and the generator for 50 at 1e-4.

    Differs: attacks images alone, as the authors' code; codes are of the searched modality (their image codes
    in any direction); the text of a target is that of a training pair with its labels (their test
    draws a pair of the database, which may share labels with the query); labels and texts are fused as
    vectors in place of 16 x 32 x 32 maps; planes stand behind the colours, not between them, which a
    convolution cannot tell; the generator learns within eps, see ``pros-gan`` (``reconstruction`` 150).
    """
    sizes = {"hidden": hidden, "width": width, "steps": fit_steps, "bounded": bounded}
    weight = change_weight(reconstruction, bounded, published=150.0)
    guide = TargetGenerator(epochs, rate, weight, texts=True, **sizes)  # type: ignore[arg-type]
    guide = replace(guide, pairs_weight=5.0, quantisation=1e-3)
    return generator_attack("ta-dch", guide, eps, generator, transfer)
