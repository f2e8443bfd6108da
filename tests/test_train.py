"""The loop: the same bytes for the same seed, stopped or not; what it minimises has its minimum where it should."""

import math
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from families import tiny_config, tiny_model
from tersely.errors import AnatomyError, CheckpointError, NumericalError, RecipeError
from tersely.journal import Journal
from tersely.kinds import LowRankLinear, Made
from tersely.stats import Stats
from tersely.train import OBJECTIVES, RELAXATIONS, Relaxed, Training, harden, loop, objectives, relax_sites, train
from tersely.train.data import Batches, hold_out
from tersely.train.objectives import Logits, Tokens
from tersely.train.relax.adapter import Adapter

LINEARS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
NAMES = [f"model.layers.{block}.{part}.{n}" for block in range(2) for part, names in LINEARS.items() for n in names]
SHORT = Training(tokens=10 * 4 * 16, batch=4, rate=3e-3, held_out=4, evaluate_every=4, save_every=3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def windows(count: int = 24, length: int = 16) -> Tensor:
    """Tokens that follow each other by a rule, with exceptions."""
    drawn = torch.randint(1, 5, (count, length), generator=generator(7))
    return 3 + drawn.square().cumsum(1) % 60


def compressed_model(rank: int = 12) -> nn.Module:
    """The tiny model, its linears cut to a low rank."""
    model = tiny_model("llama")
    for name in NAMES:
        u, s, vt = torch.linalg.svd(model.get_submodule(name).weight.detach(), full_matrices=False)
        model.set_submodule(name, LowRankLinear.from_factors(u[:, :rank] * s[:rank], vt[:rank]))
    return model.eval()


def trained(training: Training = SHORT, *, relaxation=None, model: nn.Module | None = None, seed: int = 0, **keywords):
    """A model after training with adapters, its relaxed modules, and what happened."""
    relaxation, draws = relaxation or Adapter(rank=2, dropout=0.1), generator(seed)
    model = model or tiny_model("llama")
    relaxed = relax_sites(model, NAMES, relaxation, statistics(model, relaxation), draws)
    arguments = {"objectives": {"tokens": Tokens()}, "windows": windows(), "relaxation": relaxation} | keywords
    return model, relaxed, train(model, training, generator=draws, **arguments)


def statistics(model: nn.Module, relaxation) -> dict[str, Stats]:
    """Of inputs that are as good as any."""
    found = {}
    for name in NAMES if relaxation.needs else ():
        width = model.get_submodule(name).in_features
        found[name] = Stats({kind: kind(width) for kind in relaxation.needs})
        found[name].update(torch.randn(8, width, generator=generator()))
    return found


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_a_seed_decides_and_the_global_one_does_not():
    torch.manual_seed(1)
    first = trained()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = trained()
    assert torch.equal(torch.get_rng_state(), before)
    assert same(numbers(first[0]), numbers(again[0]))
    assert first[2] == again[2]
    assert not same(numbers(first[0]), numbers(trained(seed=1)[0]))


def test_what_is_not_named_is_frozen_and_free_again_afterwards():
    model = tiny_model("llama").train()
    before = numbers(model)
    _, relaxed, outcome = trained(model=model)
    assert outcome.steps == 10
    assert outcome.tokens == 640
    after = numbers(model)
    for name, tensor in before.items():
        outer, _, last = name.rpartition(".")
        assert torch.equal(after[f"{outer}.base.{last}" if outer in relaxed else name], tensor)
    assert all((module.up != 0).any() for module in relaxed.values())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("at_once", [1, 3])
def test_parts_of_a_batch_add_up_to_it(at_once):
    """One step of plain descent's direction is hidden by Adam, so the losses of several steps are compared."""
    relaxation = Adapter(rank=2)
    whole = trained(relaxation=relaxation)[2].losses
    parts = trained(replace(SHORT, at_once=at_once), relaxation=relaxation)[2].losses
    assert parts == pytest.approx(whole, rel=1e-4)


class StopError(Exception):
    """What a kill would be."""


def stop_at(step: int):
    def callback(done: int, model: nn.Module) -> None:
        if done == step:
            raise StopError

    return callback


@pytest.mark.parametrize("name", RELAXATIONS)
def test_stopped_anywhere_and_resumed_it_ends_with_the_same_bytes(name, tmp_path):
    fields = {"dropout": 0.1} if name in ("adapter", "kasa") else {}
    relaxation = RELAXATIONS[name](**fields)
    keywords = {"relaxation": relaxation, "bits": 6.0, "objectives": {"logits": Logits(), "tokens": Tokens()}}
    whole, _, outcome = trained(**keywords, teacher=tiny_model("llama"))
    journal = Journal(tmp_path, "one")
    for step in (2, 7, 10):  # before anything was saved, after, and with every step done but the last save
        with pytest.raises(StopError):
            trained(**keywords, teacher=tiny_model("llama"), journal=journal, callback=stop_at(step))
    seen: list[int] = []
    callback = {"callback": lambda step, model: seen.append(step)}
    model, _, resumed = trained(**keywords, teacher=tiny_model("llama"), journal=journal, **callback)
    assert seen == [10]
    assert same(numbers(model), numbers(whole))
    assert resumed == outcome
    finished, _, again = trained(**keywords, teacher=tiny_model("llama"), journal=journal, callback=stop_at(10))
    assert same(numbers(finished), numbers(whole))
    assert again == outcome


def test_patience_brings_the_best_numbers_back_and_survives_a_stop(tmp_path):
    """A rate far too large: whatever follows is worse than the start, or than an early step."""
    training = replace(SHORT, rate=1.0, schedule="constant", warmup=0.0, evaluate_every=1, patience=3, clip=0.0)
    model, _, outcome = trained(training)
    best = min(outcome.held_out, key=lambda measured: measured.loss)
    assert outcome.kept == best.step
    assert outcome.steps == best.step + 3 < 10
    journal = Journal(tmp_path, "one")
    with pytest.raises(StopError):
        trained(training, journal=journal, callback=stop_at(outcome.steps - 1))
    resumed = trained(training, journal=journal)
    assert same(numbers(resumed[0]), numbers(model))
    assert resumed[2] == outcome
    # the numbers that stand in the model are those that were measured
    held_out = hold_out(windows(), training.held_out)[1]
    with torch.no_grad():
        assert Tokens()(model.eval()(held_out), None, held_out).item() == pytest.approx(best.loss, rel=1e-5)


@pytest.mark.parametrize("patience", [0, 9])
@pytest.mark.parametrize("name", RELAXATIONS)
def test_interrupted_it_keeps_its_last_whole_step(name, patience, tmp_path, monkeypatch, interruptible):
    """Wherever that is: before, while and after the numbers move, in a measurement, behind a step."""
    training = replace(SHORT, save_every=100, patience=patience)
    keywords = {"relaxation": RELAXATIONS[name](), "bits": 6.0}
    whole, _, outcome = trained(training, **keywords)
    journal = Journal(tmp_path, "one")
    seen: list[int] = []

    def interrupted_in(place: object, name: str, count: int, *, after: bool = False) -> int:
        """Ask the process to end when a function is called for that time; gives the steps that are kept."""
        usual, calls = getattr(place, name), []

        def function(*arguments, **named):
            calls.append(name)
            if after:
                usual(*arguments, **named)
            if len(calls) == count:
                signal.raise_signal(signal.SIGINT)
            return None if after else usual(*arguments, **named)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, name, function)
            trained(training, **keywords, journal=journal, callback=lambda step, model: seen.append(step))
        return len(journal.read_tensors("training.safetensors")["losses"]) if journal.has("training.safetensors") else 0

    assert interrupted_in(Tokens, "__call__", 1) == 0
    assert interrupted_in(torch.optim.AdamW, "step", 2) == 2
    assert interrupted_in(torch.optim.AdamW, "step", 1, after=True) == 3
    assert interrupted_in(loop._Run, "_measure", 1) == 4  # the measurement is made good
    assert interrupted_in(Tokens, "__call__", 3) == 5
    model, _, resumed = trained(training, **keywords, journal=journal)
    assert same(numbers(model), numbers(whole))
    assert resumed == outcome
    assert seen == sorted({*seen})  # no step was done twice


def test_the_state_of_another_training_is_refused(tmp_path):
    journal = Journal(tmp_path, "one")
    trained(journal=journal)
    for other in ({"seed": 1}, {"windows": windows(25)}, {"objectives": {"tokens": Tokens(), "again": Tokens()}}):
        with pytest.raises(CheckpointError, match="another training"):
            trained(journal=journal, **other)
    with pytest.raises(CheckpointError, match="another training"):
        trained(replace(SHORT, rate=1e-3), journal=journal)


def test_a_loss_that_is_not_finite_names_the_step():
    def spoil(step: int, model: nn.Module) -> None:
        if step == 3:
            model.get_submodule(NAMES[0]).up.data.fill_(math.nan)

    with pytest.raises(NumericalError, match="step 4 of training: the loss is nan"):
        trained(callback=spoil)


def test_a_gradient_that_is_not_finite_is_not_taken():
    """The loss is a number, its slope is not: ‖0‖ to the power of a half."""

    class Steep(Priced):
        def penalty(self) -> Tensor:
            return (self.width - 8.0).abs().sqrt()

    class Careless(Pricing):
        def relax(self, linear, stats, draws):
            return Steep(linear)

    with pytest.raises(NumericalError, match="step 1 of training: the norm of the gradient"):
        trained(replace(SHORT, clip=0.0, held_out=0), relaxation=Careless(), bits=8.0)


def test_a_compressed_model_heals():
    """Adapters start from the compressed model, teach it from the dense one, and harden into wider factors."""
    teacher, model = tiny_model("llama"), compressed_model()
    training = replace(SHORT, tokens=40 * 4 * 16, rate=1e-2, evaluate_every=40)
    _, relaxed, outcome = trained(
        training, relaxation=Adapter(rank=2), model=model, objectives={"logits": Logits()}, teacher=teacher
    )
    first, last = outcome.held_out
    assert first.loss > 0.01
    assert last.loss < 0.75 * first.loss
    with torch.no_grad():
        before = model.eval()(windows()).logits
        made = harden(model, relaxed)
        torch.testing.assert_close(model(windows()).logits, before, rtol=1e-4, atol=1e-5)
    for name in NAMES:
        assert isinstance(made[name], Made)
        assert made[name].specs[""]["rank"] == 12 + 2
        assert torch.equal(made[name].state["up.weight"], model.get_submodule(name).up.weight)


def test_a_truncating_adapter_starts_where_nothing_was_learned_and_keeps_the_function():
    model, relaxed, outcome = trained(relaxation=RELAXATIONS["kasa"](rank=2))
    assert outcome.held_out[-1].loss < outcome.held_out[0].loss
    with torch.no_grad():
        before = model.eval()(windows()).logits
        made = harden(model, relaxed)
        torch.testing.assert_close(model(windows()).logits, before, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(made[name]["weight"], model.get_submodule(name).weight) for name in NAMES)
    assert {type(model.get_submodule(name)) for name in NAMES} == {nn.Linear}


def test_a_model_in_half_precision_trains_and_stays_in_it():
    model = compressed_model().bfloat16()
    _, relaxed, outcome = trained(
        relaxation=Adapter(rank=2), model=model, objectives={"logits": Logits()}, teacher=tiny_model("llama").bfloat16()
    )
    assert outcome.held_out[-1].loss < outcome.held_out[0].loss
    harden(model, relaxed)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


def test_a_model_trains_from_nothing():
    config = tiny_config("llama")
    config.tie_word_embeddings = True
    model = tiny_model("llama", config=config)
    seen: list[int] = []
    training = replace(SHORT, tokens=60 * 4 * 16, rate=1e-2, decay=0.1, evaluate_every=60)
    outcome = train(
        model, training, objectives={"tokens": Tokens()}, windows=windows(), generator=generator(), parameters=["*"],
        callback=lambda step, now: seen.append(step),
    )  # fmt: skip
    assert outcome.held_out[-1].loss < outcome.held_out[0].loss - 0.5
    assert outcome.losses[0] > outcome.losses[-1]
    assert seen == list(range(61))


def test_parameters_train_in_place_beside_what_is_relaxed():
    model = tiny_model("llama")
    before = numbers(model)
    trained(model=model, parameters=["*norm.weight"])
    changed = {
        name for name, tensor in numbers(model).items() if name in before and not torch.equal(tensor, before[name])
    }
    assert changed == {name for name in before if name.endswith("norm.weight")}


class Priced(Relaxed):
    """A linear with a learned width, which only its price moves."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.width = nn.Parameter(torch.tensor(8.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"quantizers": [self.width]}

    def bits(self) -> Tensor:
        return self.width * self.linear.weight.numel()

    def penalty(self) -> Tensor:
        return 0.0 * self.width

    def advance(self, done: float) -> None:
        self.told = [*getattr(self, "told", []), done]

    def harden(self) -> nn.Module:
        return self.linear


class Pricing:
    paper = summary = "nobody, 2000"
    needs = ()

    def relax(self, linear, stats, draws):
        return Priced(linear)

    def budget(self, modules, bits):
        weights = sum(module.linear.weight.numel() for module in modules)
        return (sum(module.bits() for module in modules) / weights - bits).abs()


def test_the_budget_moves_what_has_a_rate_of_its_own():
    training = replace(SHORT, quantizer_rate=0.5, schedule="constant", warmup=0.0)
    _, relaxed, outcome = trained(training, relaxation=Pricing(), bits=4.0)
    widths = [module.width.item() for module in relaxed.values()]
    assert widths == pytest.approx([4.0] * len(NAMES), abs=1.0)
    assert outcome.losses[0] == pytest.approx(outcome.held_out[0].loss + 4.0, abs=0.5)
    assert all(module.told == [step / 10 for step in range(11)] for module in relaxed.values())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"objectives": {}}, "without an objective"),
        ({"objectives": {"logits": Logits()}}, "compares with a teacher"),
        ({"windows": torch.zeros(12, dtype=torch.long)}, "windows of shape"),
        ({"windows": windows(7)}, "more than half"),
        ({"parameters": ["*"], "model": tiny_model("llama").bfloat16()}, "too coarse"),
    ],
)
def test_what_cannot_train_is_refused_before_it_begins(keywords, message):
    with pytest.raises(RecipeError, match=message):
        trained(**keywords)


def test_nothing_to_train_a_missing_name_and_a_teacher_that_is_the_student_are_refused():
    model, draws = tiny_model("llama"), generator()
    arguments = {"objectives": {"tokens": Tokens()}, "windows": windows(), "generator": draws}
    with pytest.raises(RecipeError, match=r"nothing in the model would train.*named like nothing"):
        train(model, SHORT, **arguments, parameters=["nothing"])
    with pytest.raises(RecipeError, match="cannot teach itself"):
        train(model, SHORT, **arguments, parameters=["*"], teacher=model)
    with pytest.raises(RecipeError, match="no such module"):
        relax_sites(model, ["model.nothing"], Adapter(), {}, draws)
    with pytest.raises(RecipeError, match=r"model\.norm: a LlamaRMSNorm is no linear"):
        relax_sites(model, ["model.norm"], Adapter(), {}, draws)


@pytest.mark.parametrize(
    "fields",
    [{"tokens": 0}, {"batch": 0}, {"rate": math.nan}, {"warmup": 1.0}, {"schedule": "steps"}, {"clip": -1.0},
     {"patience": 1, "held_out": 0}, {"at_once": 0}, {"quantizer_rate": 0.0}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(fields):
    with pytest.raises(RecipeError, match=next(iter(fields))):
        Training(**fields)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 100])
def test_the_rate_rises_to_its_largest_and_never_reaches_zero(schedule, steps):
    training = Training(schedule=schedule, warmup=0.1)
    factors = [training.factor(step, steps) for step in range(steps)]
    assert max(factors) == 1.0
    assert min(factors) > 0
    assert factors == sorted(factors[: factors.index(1.0)]) + sorted(factors[factors.index(1.0) :], reverse=True)


# --- data -------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 20), batch=st.integers(1, 25), seed=st.integers(0, 2**62))
def test_every_epoch_sees_every_window_once(count, batch, seed):
    batches = Batches(count, batch, seed)
    steps = [batches.at(step) for step in range(2 * count)]
    seen = torch.cat(steps)
    for epoch in range(len(seen) // count):
        assert seen[epoch * count : (epoch + 1) * count].sort().values.tolist() == list(range(count))
    # a step depends on nothing that came before it
    assert torch.equal(Batches(count, batch, seed).at(2 * count - 1), steps[-1])


@settings(max_examples=30, deadline=None)
@given(total=st.integers(1, 60), data=st.data())
def test_windows_held_out_are_not_trained_on_and_lie_evenly(total, data):
    count = data.draw(st.integers(0, total // 2))
    rows = torch.arange(total)[:, None]
    rest, held = hold_out(rows, count)
    assert len(held) == count
    assert torch.equal(torch.cat([rest, held]).sort(0).values, rows)
    if count > 1:
        gaps = held.flatten().diff()
        assert gaps.max() - gaps.min() <= 1


# --- objectives -------------------------------------------------------------------------------------------------------

EVERY_LOGITS = {
    "forward": Logits(),
    "warm": Logits(temperature=3.0),
    "skewed": Logits(mix=0.1),
    "reverse": Logits(divergence="reverse"),
    "skewed-reverse": Logits(divergence="reverse", mix=0.1),
    "symmetric": Logits(divergence="symmetric", mix=0.5),
    "lopsided": Logits(divergence="symmetric", mix=0.2),
}
every_divergence = pytest.mark.parametrize("objective", EVERY_LOGITS.values(), ids=EVERY_LOGITS)


def logits(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(2, 5, 11, dtype=torch.float64, generator=generator(seed))


def loss_of(objective: Logits, student: Tensor, teacher: Tensor) -> Tensor:
    return objective(SimpleNamespace(logits=student), SimpleNamespace(logits=teacher), torch.zeros(2, 5))


@every_divergence
def test_a_teacher_against_itself_has_no_loss_and_no_gradient(objective):
    student = logits(0).requires_grad_()
    loss = loss_of(objective, student, student.detach().clone())
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert student.grad.abs().max().item() < 1e-12


@every_divergence
def test_a_divergence_is_positive_and_ignores_what_is_impossible(objective):
    student, teacher = logits(1).requires_grad_(), logits(2)
    assert loss_of(objective, student, teacher).item() > 0
    padded = [torch.cat([x, torch.full((2, 5, 3), -math.inf, dtype=x.dtype)], -1) for x in (student, teacher)]
    loss = loss_of(objective, *padded)
    assert loss.item() == pytest.approx(loss_of(objective, student, teacher).item(), rel=1e-12)
    loss.backward()
    assert torch.isfinite(student.grad).all()


@every_divergence
def test_gradients_are_those_of_finite_differences(objective):
    teacher = logits(2)
    assert torch.autograd.gradcheck(lambda student: loss_of(objective, student, teacher), logits(1).requires_grad_())


@every_divergence
@pytest.mark.parametrize("at_once", [1, 3, 4], ids="{} positions at once".format)
def test_how_many_positions_are_compared_at_once_changes_nothing(objective, at_once, monkeypatch):
    def found() -> tuple[Tensor, Tensor]:
        student = logits(1).requires_grad_()
        loss = loss_of(objective, student, logits(2))
        (3 * loss).backward()
        return loss, student.grad

    whole = found()
    monkeypatch.setattr(objectives, "LOGITS_AT_ONCE", 11 * at_once)
    torch.testing.assert_close(found(), whole, rtol=1e-12, atol=1e-15)


def test_the_gradient_of_the_plain_form_is_the_difference_of_the_distributions():
    student, teacher = logits(1).requires_grad_(), logits(2)
    loss_of(Logits(), student, teacher).backward()
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)) / 10)


def test_jensen_and_shannons_divergence_is_symmetric_and_bounded():
    objective, far = Logits(divergence="symmetric", mix=0.5), logits(2, scale=100.0)
    student = logits(1, scale=100.0)
    assert loss_of(objective, student, far).item() == pytest.approx(loss_of(objective, far, student).item(), rel=1e-12)
    assert 0.5 < loss_of(objective, student, far).item() <= math.log(2)


def test_a_skewed_divergence_is_bounded():
    assert loss_of(Logits(mix=0.1), logits(1, scale=1000.0), logits(2, scale=1000.0)).item() <= math.log(1 / 0.1)


def test_the_size_of_the_gradient_hardly_depends_on_the_temperature():
    sizes = []
    for temperature in (20.0, 80.0):
        student = logits(1).requires_grad_()
        loss_of(Logits(temperature), student, logits(2)).backward()
        sizes.append(student.grad.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_the_cross_entropy_is_that_of_the_next_token():
    student, tokens = logits(1), torch.randint(0, 11, (2, 5), generator=generator(3))
    wanted = [functional.cross_entropy(student[row, :-1], tokens[row, 1:]) for row in range(2)]
    assert Tokens()(SimpleNamespace(logits=student), None, tokens).item() == pytest.approx(sum(wanted).item() / 2)


def test_softmaxes_are_taken_in_full_precision():
    student, teacher = logits(1, 5.0).bfloat16(), logits(2, 5.0).bfloat16()
    wanted = loss_of(Logits(), student.double(), teacher.double()).item()
    loss = loss_of(Logits(), student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


def test_objectives_that_make_no_sense_are_refused():
    for fields in ({"temperature": 0.0}, {"divergence": "sideways"}, {"mix": 1.0}, {"divergence": "symmetric"}):
        with pytest.raises(RecipeError, match="logits"):
            Logits(**fields)
    with pytest.raises(AnatomyError, match="same tokens"):
        loss_of(Logits(), logits(1), logits(2)[..., :-1])
    assert {name: kind.teaches for name, kind in OBJECTIVES.items()} == {"logits": True, "tokens": False}
