"""Complete model folders for the tests, built once a session, and shapes that are checked while the tests run."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

# Read when the libraries are imported.  No test touches the network, and what is printed is what is tested.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import pytest
import torch
from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from families import tiny_config, tiny_model

SPECIAL = ("<pad>", "</s>", "<s>")  # 0, 1, 2, as the tiny configurations say
WORDS = tuple(f"w{number}" for number in range(len(SPECIAL), 60))
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
LICENCE = "Do what you like with it.\n"


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Hold a function to the shapes in its hints.  All other hints are left to mypy: beartype does not know `Self` in
    functions that are decorated one by one, nor protocols without a run-time check."""
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if _has_shape(hint)}
    return beartype(function)


def _has_shape(hint: Any) -> bool:
    is_array = isinstance(hint, type) and issubclass(hint, AbstractArray)
    return is_array or any(_has_shape(part) for part in get_args(hint))


install_import_hook(["tersely.kinds", "tersely.linalg", "tersely.methods", "tersely.stats"], "conftest.check_shapes")


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_disks() -> Iterator[None]:
    """A run syncs dozens of small files, which takes longer than all its mathematics here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What a shell starts in the background is deaf to interrupts, and so is what that starts."""
    usual = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4000 words in which some follow others more often than chance: inputs that are correlated."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(1, 9, (4000,), generator=generator).square().cumsum(0) % len(WORDS)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(WORDS[step] for step in steps), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """One word, one token; as many as the tiny models know."""
    words = Tokenizer(WordLevel({word: number for number, word in enumerate((*SPECIAL, *WORDS))}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        chat_template=CHAT_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def own_tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    """Tokenizers of families for which transformers opens no other kind; here one character, one token."""
    characters = {character: number for number, character in enumerate((*SPECIAL, *"w0123456789Ġ"))}
    settings = {"unk_token": "<pad>", "pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    return {"qwen2": Qwen2Tokenizer(vocab=characters, merges=[], chat_template=CHAT_TEMPLATE, **settings)}


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerBase,
    own_tokenizers: dict[str, PreTrainedTokenizerBase],
) -> Callable[..., Path]:
    """A function: family, class of the model, dtype, largest shard, settings of the configuration → a folder as one
    finds them on the hub, with tokenizer, generation settings, licence and a card.  Read-only: copy it to change it."""
    made: dict[Any, Path] = {}

    def make(
        family: str = "llama",
        architecture: str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        shard: str = "1GB",
        **settings: Any,
    ) -> Path:
        key = (family, architecture, dtype, shard, *sorted(settings.items()))
        if key not in made:
            config = tiny_config(family)
            for name, value in settings.items():
                setattr(config, name, value)
            folder = tmp_path_factory.mktemp(f"{family}-") / "model"
            model = tiny_model(family, architecture, config).to(dtype)
            model.tie_weights()
            if model.can_generate():
                model.generation_config = GenerationConfig(bos_token_id=2, eos_token_id=1, pad_token_id=0)
            model.save_pretrained(folder, max_shard_size=shard)
            own_tokenizers.get(family, tokenizer).save_pretrained(folder)
            (folder / "LICENSE").write_text(LICENCE)
            (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# The card of the base model\n")
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def compressed(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path], text_file: Path
) -> Callable[..., Path]:
    """A function: as `model_folder` → that folder, compressed by svd_llm to 0.6 of its linears.  Read-only."""
    from tersely.pipeline import compress

    made: dict[Path, Path] = {}

    def make(*arguments: Any, **keywords: Any) -> Path:
        model = model_folder(*arguments, **keywords)
        if model not in made:
            made[model] = tmp_path_factory.mktemp("compressed-") / "out"
            compress(model, made[model], method="svd_llm", keep=0.6, calibrate=[str(text_file)], length=32, samples=16)
        return made[model]

    return make


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A function that copies a folder, so that the copy may be damaged."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"copy-of-{folder.name}"))

    return copy
