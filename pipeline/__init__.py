"""The stages (`python -m pipeline.extract`, `train`, `evaluate`, `caption`, `demo`) and what they
share.
"""

import importlib.util
import os
import sys

# Before torch starts its threads: how long one that waits for the other spins before it sleeps, in
# turns of a loop. With a busy neighbour on two cores spinning cost 10 times the step (an AMD EPYC)
# and 1.6 times (an Intel Xeon); sleeping at once (1000) costs a quiet Xeon 1.6 times.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _refuse_foreign_packages() -> None:
    """Stop where Python would take another package (or file, say data.py) for our `data` or
    `models`.

    `python -m pipeline.STAGE` prints the message and exits with 2; an import from Python raises
    ImportError.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for name in ("data", "models"):
        ours, module = os.path.join(root, name), sys.modules.get(name)
        if module is None:
            spec = importlib.util.find_spec(name)
            if spec is None:
                continue  # the import that needs it says so
            file, folders = spec.origin, spec.submodule_search_locations
        else:
            file, folders = getattr(module, "__file__", None), getattr(module, "__path__", None)
        if file and os.path.realpath(os.path.dirname(file)) == os.path.realpath(ours):
            continue
        found = file or next(iter(folders or ()), f"a module called {name!r}")
        why = "it was imported before" if module else "Python finds it first"
        message = (
            f"{found} hides Onceover's package {name!r} ({ours}): {why}. "
            "Rename it, or start Python from another folder (and without it on PYTHONPATH)."
        )
        if sys.argv[:1] == ["-m"]:  # `python -m` sets this while it looks for the module
            print(f"Error: {message}", file=sys.stderr)
            raise SystemExit(2)
        raise ImportError(message, name=name, path=file)


_refuse_foreign_packages()
