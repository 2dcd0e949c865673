"""The commands of Onceover and their parts.

Each command is run as a module: `python -m pipeline.extract`, `train`, `evaluate`, `caption` and
`demo`.
"""

import importlib.util
import os
import sys

# How long an OpenMP thread spins while it waits, in loop iterations, before it sleeps. It must be
# set before torch starts its threads. If another program uses one of two cores, endless spinning
# made a step 10 times slower (AMD EPYC) or 1.6 times slower (Intel Xeon). With 1000 iterations, a
# step on an otherwise idle Xeon was 1.6 times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _refuse_foreign_packages() -> None:
    """Raise an error if Python imports another package or file as `data` or `models`.

    `python -m pipeline.COMMAND` prints the message and exits with code 2. An import from Python
    raises ImportError.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for name in ("data", "models"):
        folder, module = os.path.join(root, name), sys.modules.get(name)
        if module is None:
            spec = importlib.util.find_spec(name)
            if spec is None:
                continue  # a later import raises the error
            file, search_paths = spec.origin, spec.submodule_search_locations
        else:
            file = getattr(module, "__file__", None)
            search_paths = getattr(module, "__path__", None)
        if file and os.path.realpath(os.path.dirname(file)) == os.path.realpath(folder):
            continue
        other = file or next(iter(search_paths or ()), f"a module called {name!r}")
        reason = "it was imported earlier" if module else "Python finds it first"
        message = (
            f"{other} hides Onceover's package {name!r} ({folder}): {reason}. "
            "Rename it, or start Python from another folder and remove its folder from PYTHONPATH."
        )
        if sys.argv[:1] == ["-m"]:  # `python -m` sets this while it searches for the module
            print(f"Error: {message}", file=sys.stderr)
            raise SystemExit(2)
        raise ImportError(message, name=name, path=file)


_refuse_foreign_packages()
