"""Replay is the model: block by block the same hidden states and the same inputs, with one block in memory."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier, Thread, main_thread
from time import sleep

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from families import TINY, tiny_config, tiny_model
from tersely import calibrate
from tersely.anatomy import Anatomy, anatomy_of
from tersely.calibrate import Blocks, Replay, StatisticsStore, stream_list, watch_list
from tersely.checkpoint import ForeignNamesError, Source, open_source
from tersely.errors import NumericalError, RecipeError
from tersely.kernels import Quicker
from tersely.kinds import LowRankLinear, Made
from tersely.opening import rewrite_names
from tersely.recipe import Calibration
from tersely.side_by_side import Part, side_by_side
from tersely.stats import STATISTICS, AbsMax, BucketGram, Cross, Drift, Gram, Power, Stats
from tersely.windows import ENOUGH, Windows, read_windows

every_family = pytest.mark.parametrize("family", TINY)

ROWS, LENGTH = 5, 12
AT_ONCE = 2  # windows in a batch: the last one is smaller


@dataclass(frozen=True)
class Case:
    """A model, and the folder it was saved in, opened."""

    model: PreTrainedModel
    source: Source
    anatomy: Anatomy


@pytest.fixture(scope="session")
def case(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    made: dict[tuple[str, torch.dtype], Case] = {}

    def make(family: str = "llama", dtype: torch.dtype = torch.float32) -> Case:
        if (family, dtype) not in made:
            folder = model_folder(family, dtype=dtype)
            try:
                source = open_source(folder)
            except ForeignNamesError:
                renamed = tmp_path_factory.mktemp("renamed") / "model"
                rewrite_names(folder, renamed)
                source = open_source(renamed)
            model = type(tiny_model(family)).from_pretrained(folder, dtype=dtype).eval()
            made[family, dtype] = Case(model, source, anatomy_of(source.skeleton()))
        return made[family, dtype]

    return make


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "TOKENS_AT_ONCE", AT_ONCE * LENGTH)


def windows() -> Tensor:
    return torch.randint(3, 60, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def replay_of(case: Case) -> Replay:
    return Replay(case.source, case.anatomy, windows(), "cpu")


def blocks_of(case: Case) -> Blocks:
    return Blocks(case.source, case.anatomy, "cpu")


@torch.no_grad()
def seen_in_model(model: PreTrainedModel, names: list[str]) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Module → its first argument and its output in every batch of a forward pass of the whole model.

    Products are those of replay: what is seen has to be the same bits."""
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in names}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name][0].append(arguments[0])
            seen[name][1].append(output)

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    with Quicker():
        for rows in windows().split(AT_ONCE):
            model(rows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def outputs_of(block: nn.Module) -> list[Tensor]:
    """A list that fills with what the block returns."""
    outputs: list[Tensor] = []
    block.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    return outputs


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


# --- replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float32) for family in TINY]
    # torch multiplies bfloat16 experts only where their widths are whole multiples of 8
    + [(family, torch.bfloat16) for family in TINY if family not in ("mixtral", "qwen3_moe")],
    ids=str,
)
def test_every_block_returns_what_it_returns_in_the_model(family, dtype, case):
    tried = case(family, dtype)
    replay, blocks = replay_of(tried), blocks_of(tried)
    seen = seen_in_model(tried.model, list(tried.anatomy.blocks))
    for index, name in enumerate(tried.anatomy.blocks):
        assert replay.at == index
        block = blocks.dense(index)
        outputs = outputs_of(block)
        replay.observe(block, {}, advance=True)
        assert outputs[0].dtype == dtype
        assert equal(outputs, seen[name][1])
    assert replay.at == len(tried.anatomy.blocks)


def test_products_of_replay_differ_from_the_plain_ones_by_rounding_alone(case):
    tried = case("llama")
    last = tried.anatomy.blocks[-1]
    with torch.no_grad():
        plain = [tried.model.model(rows, use_cache=False).last_hidden_state for rows in windows().split(AT_ONCE)]
    quick = [tried.model.model.norm(out) for out in seen_in_model(tried.model, [last])[last][1]]
    torch.testing.assert_close(quick, plain, rtol=1e-5, atol=1e-5)


@every_family
def test_the_gram_matrix_of_every_input_is_that_of_the_whole_model(family, case):
    tried = case(family)
    seen = seen_in_model(tried.model, [site.name for site in tried.anatomy.sites])
    replay, blocks = replay_of(tried), blocks_of(tried)
    checked = set()
    for index in range(len(tried.anatomy.blocks)):
        watched = watch_list(tried.anatomy, index, tried.anatomy.sites, [Gram, AbsMax], "cpu")
        replay.observe(blocks.dense(index), watched, advance=True)
        for site in tried.anatomy.sites:
            if site.block == index:
                stats = watched[site.reads][1]
                x = torch.cat([batch.flatten(0, -2) for batch in seen[site.name][0]]).double()
                torch.testing.assert_close(stats[Gram].mean(), x.T @ x / len(x), rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(stats[AbsMax].mean(), x.abs().amax(0), rtol=0, atol=0)
                assert stats.tokens == ROWS * LENGTH
                checked.add(site.name)
    assert checked == {site.name for site in tried.anatomy.sites}


def test_a_model_without_a_head_is_replayed_too(tmp_path):
    model = tiny_model("llama", "LlamaModel")
    model.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    tried = Case(model, source, anatomy_of(source.skeleton()))
    replay, blocks = replay_of(tried), blocks_of(tried)
    seen = seen_in_model(model, ["layers.1"])
    replay.observe(blocks.dense(0), {}, advance=True)
    block = blocks.dense(1)
    outputs = outputs_of(block)
    replay.observe(block, {}, advance=True)
    assert equal(outputs, seen["layers.1"][1])


@every_family
def test_looking_twice_sees_the_same(family, case):
    """Without a cache nothing of the first look is left for the second; only `advance` moves the stream."""
    tried = case(family)
    replay, blocks = replay_of(tried), blocks_of(tried)
    block, looks = blocks.dense(0), []
    for _ in range(2):
        watched = watch_list(tried.anatomy, 0, tried.anatomy.sites, [Gram], "cpu")
        replay.observe(block, watched, advance=False)
        assert replay.at == 0
        looks.append([stats[Gram].mean() for _, stats in watched.values()])
    assert equal(*looks)


@pytest.mark.parametrize("beside", [False, True])
@every_family
def test_what_comes_behind_the_last_read_is_computed_for_nobody(family, beside, case):
    """Looking at the first input alone sees what a whole run sees, and the rest of the block runs for one batch."""
    tried = case(family)
    replay, blocks = replay_of(tried), blocks_of(tried)
    key, sites = next(iter(tried.anatomy.inputs(0)))
    *_, last = (sites for _, sites in tried.anatomy.inputs(0))
    found, ran = [], []
    for advance in (False, True):
        block = blocks.dense(0)
        prefix = f"{tried.anatomy.blocks[0]}."
        ends = outputs_of(block.get_submodule(last[-1].name.removeprefix(prefix)))
        watched = watch_list(tried.anatomy, 0, sites, [Cross if beside else Gram], "cpu")
        other = (replay.fork(), blocks.dense(0)) if beside else None
        replay.observe(block, watched, advance=advance, beside=other)
        found.append(watched[key][1])
        ran.append(len(ends))
    kind = Cross if beside else Gram
    assert equal([found[0][kind].mean()], [found[1][kind].mean()])
    if family not in ("mixtral", "qwen3_moe"):  # an expert runs for the batches that are sent to it
        assert ran == [1, -(-ROWS // AT_ONCE)]


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt_neox"])
def test_how_far_the_stream_has_drifted_where_a_linear_writes_to_it(family, case):
    """E[(h - ĥ) x̂ᵀ], h and ĥ as the norm before attention or MLP reads them in the dense and in the cut model."""
    tried = case(family)
    name = next(site.name for site in tried.anatomy.sites if site.block == 0 and site.role == "mlp.up")
    cut, damage = type(tried.model)(tried.model.config).eval(), torch.full((), 0.9)
    cut.load_state_dict(tried.model.state_dict())
    cut.get_submodule(name).weight.data.mul_(damage)
    sites = [site for site in tried.anatomy.sites if site.block == 1]
    streams = stream_list(tried.anatomy, 1, sites)
    prefix = f"{tried.anatomy.blocks[1]}."
    norms = [prefix + norm for norm in streams.values()]

    replay, blocks = replay_of(tried), blocks_of(tried)
    dense = replay.fork()
    replay.observe(cut.get_submodule(tried.anatomy.blocks[0]), {}, advance=True)
    dense.observe(blocks.dense(0), {}, advance=True)
    watched = watch_list(tried.anatomy, 1, sites, [Cross, Drift], "cpu")
    replay.observe(blocks.dense(1), watched, advance=False, beside=(dense, blocks.dense(1)), streams=streams)

    before, after = (seen_in_model(model, norms) for model in (tried.model, cut))
    assert len(streams) == (1 if family == "gpt_neox" else 2)
    for key, (path, stats) in watched.items():
        if key not in streams:
            assert len(stats[Drift].mean()) == 0
            continue
        read = torch.cat([x.flatten(0, -2) for x in seen_in_model(cut, [prefix + path])[prefix + path][0]])
        h, shifted = (torch.cat([x.flatten(0, -2) for x in s[prefix + streams[key]][0]]) for s in (before, after))
        wanted = (h - shifted).double().T @ read.double() / len(read)
        assert wanted.abs().max() > 1e-6
        assert torch.allclose(stats[Drift].mean(), wanted, rtol=1e-4, atol=1e-7)


def test_a_block_that_reads_twice_is_seen_twice(case):
    tried = case("llama")
    replay, block = replay_of(tried), blocks_of(tried).dense(0)
    run = block.forward
    block.forward = lambda *given, **named: (run(*given, **named), run(*given, **named))[1]
    watched = watch_list(tried.anatomy, 0, tried.anatomy.sites, [Gram], "cpu")
    replay.observe(block, watched, advance=False)
    assert {stats.tokens for _, stats in watched.values()} == {2 * ROWS * LENGTH}


def test_a_block_is_followed_by_what_it_was_replaced_with(case):
    """The next block reads the output of the compressed block, not of the dense one."""
    tried = case("llama")
    model, source = tiny_model("llama"), tried.source
    name = "model.layers.0.mlp.down_proj"
    weight = source.tensor(f"{name}.weight")
    module = LowRankLinear.from_factors(torch.eye(32)[:, :3], weight[:3])
    model.set_submodule(name, module)
    seen = seen_in_model(model, list(tried.anatomy.blocks))

    replay, blocks = replay_of(tried), blocks_of(tried)
    replay.observe(blocks.cut(0, {name: Made.of(module)}), {}, advance=True)
    block = blocks.dense(1)
    outputs = outputs_of(block)
    replay.observe(block, {}, advance=True)
    assert equal(outputs, seen["model.layers.1"][1])
    assert not equal(outputs, seen_in_model(tried.model, ["model.layers.1"])["model.layers.1"][1])


def test_cutting_a_block_leaves_no_trace_in_the_next_one(case):
    tried = case("llama")
    blocks, name = blocks_of(tried), "model.layers.0.mlp.down_proj"
    module = LowRankLinear.from_factors(torch.ones(32, 2), torch.ones(2, 44))
    cut = blocks.cut(0, {name: Made.of(module)})
    assert isinstance(cut.mlp.down_proj, LowRankLinear)
    assert torch.equal(cut.mlp.down_proj.to_dense(), torch.full((32, 44), 2.0))
    dense = blocks.dense(0)
    assert {n: t.shape for n, t in dense.state_dict().items()} == {
        n: t.shape for n, t in tried.model.model.layers[0].state_dict().items()
    }
    assert not dense.training
    assert not any(parameter.is_meta for parameter in dense.parameters())


@pytest.mark.parametrize("family", ["gemma3_text", "mistral"])
def test_batches_share_the_masks_and_tables_that_are_equal(family, case):
    """They would otherwise be kept once for every batch: for long windows more than all hidden states."""
    tried = case(family)
    replay, blocks = replay_of(tried), blocks_of(tried)
    masks = 0
    for index in range(len(tried.anatomy.blocks)):
        block, calls = blocks.dense(index), []
        block.register_forward_pre_hook(lambda _, arguments, keywords, to=calls: to.append(keywords), with_kwargs=True)
        replay.observe(block, {}, advance=True)
        first, second, smaller = calls
        assert all(one is other for one, other in zip(tensors(first), tensors(second), strict=True))
        assert len(tensors(first)) >= 3  # rotary tables of two tensors, positions, for some blocks a mask
        if first["attention_mask"] is not None:
            masks += 1
            assert first["attention_mask"].shape == (AT_ONCE, 1, LENGTH, LENGTH)
            assert smaller["attention_mask"].shape == (ROWS % AT_ONCE, 1, LENGTH, LENGTH)
    assert masks == (1 if family == "gemma3_text" else 2)


def tensors(keywords: dict[str, object]) -> list[Tensor]:
    flat = [part for value in keywords.values() for part in (value if isinstance(value, tuple) else (value,))]
    return [part for part in flat if isinstance(part, Tensor)]


def test_hooks_and_stubs_are_gone_afterwards(case):
    tried = case("llama")
    replay, blocks = replay_of(tried), blocks_of(tried)
    block = blocks.dense(0)
    watched = watch_list(tried.anatomy, 0, tried.anatomy.sites, [Power], "cpu")
    replay.observe(block, watched, advance=False)
    with torch.no_grad():
        block.mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(NumericalError):
        replay.observe(block, watched, advance=False)
    assert not any(module._forward_pre_hooks for module in block.modules())
    assert not any("forward" in vars(module) for module in block.modules())


@pytest.mark.parametrize(
    ("family", "parameter", "bad"),
    [
        ("llama", "mlp.down_proj.weight", torch.nan),
        ("gpt2", "mlp.c_proj.bias", torch.inf),
        ("bert", "output.LayerNorm.bias", -torch.inf),
    ],
)
def test_a_hidden_state_that_is_not_finite_names_its_block(family, parameter, bad, case):
    tried = case(family)
    replay, blocks = replay_of(tried), blocks_of(tried)
    replay.observe(blocks.dense(0), {}, advance=True)
    block = blocks.dense(1)
    block.get_parameter(parameter).data.fill_(bad)
    name = tried.anatomy.blocks[1].replace(".", r"\.")
    with pytest.raises(NumericalError, match=rf"^{name}: the hidden state is not finite for calibration batch 0"):
        replay.observe(block, {}, advance=True)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", TINY)
def test_batches_on_several_threads_add_up_to_the_same(family, case, threads, monkeypatch):
    monkeypatch.setattr(calibrate, "TOKENS_AT_ONCE", LENGTH)
    tried = case(family)

    def seen(count: int) -> tuple[list[Stats], list[Tensor]]:
        threads(count)
        replay, blocks = replay_of(tried), blocks_of(tried)
        stats = []
        for index in range(len(tried.anatomy.blocks)):
            watched = watch_list(tried.anatomy, index, tried.anatomy.sites, (Gram, AbsMax), "cpu")
            replay.observe(blocks.dense(index), watched, advance=True)
            stats += [of_input for _, of_input in watched.values()]
        assert torch.get_num_threads() == count
        return stats, [replay.hidden(batch) for batch in range(len(replay))]

    (alone, stream), (together, joined), (again, repeated) = seen(1), seen(2), seen(2)
    assert ROWS >= 2 * 2  # so that there are parts
    for one, other, third in zip(alone, together, again, strict=True):
        assert one.tokens == other.tokens == ROWS * LENGTH
        assert torch.allclose(one[Gram].mean(), other[Gram].mean(), rtol=1e-5, atol=1e-6)
        assert torch.allclose(one[AbsMax].mean(), other[AbsMax].mean(), rtol=1e-5, atol=1e-6)
        assert torch.equal(other[Gram].mean(), third[Gram].mean())
    for one, other in zip(stream, joined, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)
    assert equal(joined, repeated)


def test_what_fails_on_one_thread_is_raised_and_the_first_of_several(case, threads, monkeypatch):
    monkeypatch.setattr(calibrate, "TOKENS_AT_ONCE", LENGTH)
    tried = case("llama")
    threads(2)
    replay, block = replay_of(tried), blocks_of(tried).dense(0)
    replay.hidden(1).fill_(torch.nan)
    replay.hidden(ROWS - 1).fill_(torch.nan)
    with pytest.raises(NumericalError, match="not finite for calibration batch 1;"):
        replay.observe(block, {}, advance=True)
    assert replay.at == 0
    assert torch.get_num_threads() == 2


def test_whoever_watches_a_block_sees_batches_in_their_order(case, threads, monkeypatch):
    monkeypatch.setattr(calibrate, "TOKENS_AT_ONCE", LENGTH)
    tried = case("llama")
    threads(2)
    replay, block = replay_of(tried), blocks_of(tried).dense(0)
    outputs = outputs_of(block)
    replay.observe(block, {}, advance=True)
    assert equal(outputs, [replay.hidden(batch) for batch in range(ROWS)])


def test_threads_have_no_more_statistics_than_fit(case, threads, monkeypatch):
    monkeypatch.setattr(calibrate, "TOKENS_AT_ONCE", LENGTH)
    tried = case("llama")
    threads(2)
    replay, block = replay_of(tried), blocks_of(tried).dense(0)
    watched = watch_list(tried.anatomy, 0, tried.anatomy.sites, (Gram,), "cpu")
    assert len(replay._parts(block, watched)) == 2
    monkeypatch.setattr(calibrate, "COPIES", sum(stats.nbytes for _, stats in watched.values()) - 1)
    assert len(replay._parts(block, watched)) == 1


def test_an_interrupt_ends_all_threads_soon(interruptible):
    begun, steps = Barrier(3), [0, 0]

    def part(number: int) -> Part:
        def run(goes_on: Callable[[], bool]) -> None:
            begun.wait()
            while goes_on() and steps[number] < 5000:
                steps[number] += 1
                sleep(0.001)

        return Part(run, lambda: steps.append(-1))

    def interrupt() -> None:
        begun.wait()
        signal.pthread_kill(main_thread().ident, signal.SIGINT)

    Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        side_by_side([part(0), part(1)])
    assert len(steps) == 2  # nothing is added up
    assert max(steps) < 5000


def test_a_statistic_of_windows_sees_all_of_them_in_their_order(case, threads):
    tried = case("llama")
    means = []
    for count in (1, 2):
        threads(count)
        watched = watch_list(tried.anatomy, 0, tried.anatomy.sites, (BucketGram,), "cpu")
        replay_of(tried).observe(blocks_of(tried).dense(0), watched, advance=False)
        means.append([of_input[BucketGram].mean() for _, of_input in watched.values()])
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in zip(*means, strict=True))


def test_only_inputs_of_wanted_sites_are_watched(case):
    anatomy = case("llama").anatomy
    watched = watch_list(anatomy, 1, anatomy.select(["attention.v", "mlp.down"]), [Gram, AbsMax], "cpu")
    assert {key: path for key, (path, _) in watched.items()} == {
        "model.layers.1:attention.in": "self_attn.q_proj",
        "model.layers.1:mlp.middle": "mlp.down_proj",
    }
    assert watched["model.layers.1:mlp.middle"][1][Gram].mean().shape == (44, 44)
    assert {kind for _, stats in watched.values() for kind in stats.kinds()} == {Gram, AbsMax}
    assert watch_list(anatomy, 0, [site for site in anatomy.sites if site.block == 1], [Gram], "cpu") == {}


# --- windows ----------------------------------------------------------------------------------------------------------

CONFIG = tiny_config("llama")  # a context of 64 tokens


@pytest.fixture
def numbers(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[[int, str], str]:
    """A function: writes a text of so many tokens, 3, 4, … in circles, and gives its path."""

    def write(count: int, name: str = "numbers.txt") -> str:
        path = tmp_path / name
        path.write_text(" ".join(f"w{3 + i % 57}" for i in range(count)))
        return str(path)

    return write


def test_the_first_windows_are_the_beginning_of_the_text(numbers, tokenizer):
    source = numbers(205)
    asked = Calibration([source], samples=7, length=10, order="first")
    got = read_windows(asked, tokenizer, CONFIG, seed=0, first_token=None)
    assert got.tokens.flatten().tolist() == [3 + i % 57 for i in range(70)]
    assert got.tokens.shape == (7, 10)
    assert got.available == 20  # the last five tokens are no window
    assert got.sources == (source,)
    said = got.describe()
    assert (said["samples"], said["length"], said["tokens"]) == (7, 10, 70)
    assert "available" in said and len(said["sha256"]) == 64


def test_random_windows_are_drawn_by_the_seed_without_replacement(numbers, tokenizer):
    asked = Calibration([numbers(2000)], samples=50, length=10)

    def draw(seed: int) -> Tensor:
        return read_windows(asked, tokenizer, CONFIG, seed=seed, first_token=None).tokens

    random = torch.get_rng_state()
    first, again, other = draw(0), draw(0), draw(1)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    everything = read_windows(
        Calibration(asked.source, samples=10**6, length=10, order="first"), tokenizer, CONFIG, seed=0, first_token=None
    ).tokens
    place = {tuple(row): index for index, row in reversed(list(enumerate(everything[:57].tolist())))}
    for drawn in (first, other):
        assert drawn.shape == (50, 10)
        assert all(tuple(row) in place for row in drawn.tolist())
    # a text whose windows all differ shows that none is drawn twice, and that they stay in the order of the text
    short = Calibration([numbers(570, "short.txt")], samples=40, length=10)
    rows = read_windows(short, tokenizer, CONFIG, seed=3, first_token=None).tokens.tolist()
    places = [place[tuple(row)] for row in rows]
    assert places == sorted(set(places)) and len(places) == 40


@pytest.mark.parametrize("order", ["random", "first"])
def test_no_more_windows_than_the_text_holds(order, numbers, tokenizer):
    asked = Calibration([numbers(99)], samples=1000, length=10, order=order)
    got = read_windows(asked, tokenizer, CONFIG, seed=5, first_token=None)
    assert got.tokens.flatten().tolist() == [3 + i % 57 for i in range(90)]
    assert got.available == 9


def test_several_texts_are_joined_in_their_order(numbers, tokenizer):
    sources = [numbers(30, "a.txt"), numbers(40, "b.txt")]
    got = read_windows(Calibration(sources, length=10, order="first"), tokenizer, CONFIG, seed=0, first_token=None)
    assert got.tokens.flatten().tolist() == [3 + i for i in range(30)] + [3 + i for i in range(40)]
    assert got.sources == tuple(sources)
    swapped = read_windows(Calibration(sources[::-1], length=10), tokenizer, CONFIG, seed=0, first_token=None)
    assert swapped.sha256 != got.sha256


def test_the_first_token_replaces_the_first_of_each_window(numbers, tokenizer):
    asked = Calibration([numbers(50)], length=10, order="first")
    without, given = (read_windows(asked, tokenizer, CONFIG, seed=0, first_token=t).tokens for t in (None, 2))
    assert given[:, 0].tolist() == [2] * 5
    assert torch.equal(given[:, 1:], without[:, 1:])
    assert given.is_contiguous()


def test_the_usual_length_is_the_context(numbers, tokenizer):
    assert read_windows(Calibration([numbers(200)]), tokenizer, CONFIG, seed=0, first_token=None).tokens.shape == (
        3,
        64,
    )


def test_a_text_of_less_than_one_window_is_refused_with_both_numbers(numbers, tokenizer):
    with pytest.raises(RecipeError, match=r"has 63 tokens, a window takes 64; give more text, or a shorter --length"):
        read_windows(Calibration([numbers(63)]), tokenizer, CONFIG, seed=0, first_token=None)


@pytest.mark.parametrize(("tokens", "enough"), [(ENOUGH * 6 - 2, False), (ENOUGH * 6, True), (ENOUGH * 6 + 2, True)])
def test_too_few_tokens_for_a_width_are_said_in_numbers(tokens, enough):
    got = Windows(torch.zeros(tokens // 2, 2, dtype=torch.long), ("a",), "0", tokens // 2)
    warning = got.shortage(6)
    assert (warning is None) == enough
    if warning:
        assert warning == (
            "46 calibration tokens for inputs of width 6: 7.7 per channel, where 8 or more are wanted; "
            "give more text or more samples"
        )


# --- the store --------------------------------------------------------------------------------------------------------

KEY = {"model": "m", "tokens": "t", "shape": (5, 12), "dtype": "torch.float32"}


def gathered(seed: int) -> Stats:
    stats = Stats({kind: kind(6) for kind in STATISTICS.values()})
    stats.update(torch.randn(9, 6, generator=torch.Generator().manual_seed(seed)))
    return stats


def test_a_store_gives_back_every_bit(tmp_path):
    store, written = StatisticsStore(tmp_path, KEY), {"layers.3:mlp.in": gathered(0), "odd|name": gathered(1)}
    store.write(3, written)
    read = StatisticsStore(tmp_path, dict(reversed(KEY.items()))).read(3, STATISTICS.values(), "cpu")
    assert read.keys() == written.keys()
    for key, stats in written.items():
        assert set(read[key].kinds()) == set(STATISTICS.values())
        for kind in stats.kinds():
            assert torch.equal(read[key][kind].mean(), stats[kind].mean())
            assert read[key][kind].tokens == stats[kind].tokens == 9
    only = store.read(3, [Gram], "cpu")
    assert all(stats.kinds() == (Gram,) for stats in only.values())


def test_a_store_has_what_was_written_under_its_key_and_block(tmp_path):
    store = StatisticsStore(tmp_path, KEY)
    assert not store.has(0, [Gram])
    stats = Stats({Gram: Gram(6)})
    store.write(0, {"x": stats})
    assert store.has(0, [Gram]) and store.has(0, [])
    assert not store.has(0, [Gram, Power])
    assert not store.has(1, [Gram])


@pytest.mark.parametrize("name", KEY)
def test_whatever_was_measured_differently_lies_elsewhere(name, tmp_path):
    StatisticsStore(tmp_path, KEY).write(0, {"x": gathered(0)})
    other = StatisticsStore(tmp_path, KEY | {name: "another"})
    assert not other.has(0, [Gram])
    other.write(0, {"x": gathered(1)})
    mine = StatisticsStore(tmp_path, KEY).read(0, [Gram], "cpu")["x"][Gram]
    assert torch.equal(mine.mean(), gathered(0)[Gram].mean())
