"""tersely makes language models smaller and proves that they still work.

Importing it is enough for ``AutoModelForCausalLM.from_pretrained`` to open compressed folders.  It costs nothing:
neither torch nor transformers is imported before something needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tersely import hf

if TYPE_CHECKING:
    from tersely.pipeline import compress, evaluate, load
    from tersely.recipe import Recipe

__version__ = "0.1.0"

_PUBLIC = {
    "Recipe": "tersely.recipe",
    "compress": "tersely.pipeline",
    "evaluate": "tersely.pipeline",
    "load": "tersely.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tersely' has no attribute {name!r}; public: {', '.join(_PUBLIC)}")
    return getattr(import_module(_PUBLIC[name]), name)


hf.register_lazily()

__all__ = ["Recipe", "__version__", "compress", "evaluate", "load"]
