"Commands with functions patched from outside: a `sitecustomize` that changes modules as they load, in every process."

import os
from pathlib import Path

HEAD = """
import functools, importlib.util, os, sys, time
from pathlib import Path

HERE = Path(__file__).parent
IN_KERNEL = "ipykernel_launcher" in " ".join(sys.orig_argv)
IN_COMMAND = "promptnb" in " ".join(sys.orig_argv) and not IN_KERNEL
PATCHES = {}

def kill_all():
    "kill -9 of the process group that started this kernel, and of the kernel, which has a group of its own."
    os.killpg(os.getpgid(os.getppid()), 9)
    os.kill(os.getpid(), 9)

class Hook:
    def find_spec(self, name, path=None, target=None):
        if name not in PATCHES:
            return None
        patch = PATCHES.pop(name)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(m):
            load(m)
            patch(m)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Hook())
"""


def patched(folder, at_once="", **bodies):
    """The environment of commands in whose processes modules are changed.

    bodies: module, dots as two underscores -> code that runs after the module's own, with the module as `m`.
    at_once: code that runs when a process starts. Both know HERE (the folder), IN_KERNEL and IN_COMMAND."""
    folder.mkdir(parents=True, exist_ok=True)
    text = HEAD + at_once
    for k, (name, body) in enumerate(bodies.items()):
        lines = "\n".join(f"    {line}" for line in body.strip("\n").splitlines())
        text += f"\ndef patch_{k}(m):\n{lines}\n\nPATCHES[{name.replace('__', '.')!r}] = patch_{k}\n"
    (folder / "sitecustomize.py").write_text(text)
    return dict(PYTHONPATH=os.pathsep.join(filter(None, [str(Path(folder)), os.environ.get("PYTHONPATH")])))
