"""
Damages the files of saved agents at random and loads them. ``test_hub_safe.py`` runs it in a process of its own:
``python fuzz_safe.py FOLDER N SEED``, where each folder in FOLDER is a saved agent. What happened is printed as JSON.
"""

import collections
import copy
import hashlib
import json
import random
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

from sb3_ext.hub import SafeFormatError, load_safe

STRINGS = [
    "os:system",
    "builtins:eval",
    "this:s",
    "torch.nn:Module.__init__",
    "torch.nn.modules.activation:ReLU",
    "torch.nn.modules.activation:ReLU.__init__.__globals__",
    "stable_baselines3.ppo.ppo:PPO",
    "stable_baselines3.her.her_replay_buffer:HerReplayBuffer",
    "sb3_contrib.ars.ars:ARS",
    "gymnasium.wrappers.rendering:RecordVideo",
    "../../../etc/passwd",
    "/etc/passwd",
    "__class__",
    "inf",
    "nan",
    "auto",
    "auto_1e999",
    "x" * 5000,
    "\x00\ud7ff",
    "",
]
NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    10**6,
    10**9,
    10**12,
    2**63 - 1,
    -(2**63),
    2**70,
    0.5,
    -0.0,
    1e-320,
    1e308,
    -1e308,
    True,
    None,
]
NODES = [
    *STRINGS,
    *NUMBERS,
    None,
    [],
    {},
    [[[[[]]]]],
    [10**9] * 3,
    [2] * 1000,
    {"pi": [10**9], "vf": [1]},
    {"$class": "os:system"},
    {"$class": "torch.optim.adam:Adam"},
    {"optimizer_class": {"$class": "torch.optim.adam:Adam"}, "optimizer_kwargs": {"capturable": True}},
    {"$class": ["os", "system"]},
    {"$tuple": [1, "step"]},
    {"$tuple": {}},
    {"$float": "inf"},
    {"$float": "nan"},
    {"$schedule": {"start": 1.0, "end": 0.0, "end_fraction": 0.0}},
    {"$schedule": {"start": 1.0, "end": 0.0, "end_fraction": 1.0}},
    {"$noise": {"class": "os:system", "mean": 0.0, "sigma": 1.0}},
    {"$unknown": 1},
    {"type": "Box", "shape": [10**6, 10**6], "dtype": "float32", "low": 0, "high": 1},
    {"type": "Discrete", "n": 10**12, "start": 0, "dtype": "int64"},
    {"type": "MultiBinary", "n": 10**12},
]
# What code from a file would do, and reading a file should not
FORBIDDEN = (
    "os.system os.exec os.posix_spawn os.fork os.remove os.rename os.mkdir os.chmod os.putenv subprocess.Popen "
    "pickle.find_class socket.connect socket.getaddrinfo ctypes.dlopen shutil.rmtree marshal.loads"
).split()


class Watch:
    """Notes forbidden things that happen between ``start`` and ``stop``. Hooks cannot be taken away: this needs a process."""

    def __init__(self):
        self.is_on, self.seen = False, []
        sys.addaudithook(self._hook)

    def _hook(self, event, args):
        if not self.is_on:
            return
        is_new_module = event == "import" and args[0] not in sys.modules
        is_write = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if event in FORBIDDEN or is_new_module or is_write:
            self.is_on = False
            self.seen.append(f"{event} {args[:2]!r}"[:200])
            self.is_on = True


def places(node, found):
    """All (container, key) in a configuration."""
    for key, child in node.items() if isinstance(node, dict) else enumerate(node):
        found.append((node, key))
        if isinstance(child, (dict, list)):
            places(child, found)
    return found


def damage_json(rng, config):
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        found = places(config, [])
        container, key = rng.choice(found)
        kind = rng.randrange(6)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice(STRINGS)] = copy.deepcopy(rng.choice(NODES))
        elif kind == 2:
            other, other_key = rng.choice(found)
            container[key] = copy.deepcopy(other[other_key])
        elif kind == 3 and isinstance(container[key], (int, float)):
            container[key] = rng.choice([container[key] * 2, container[key] + 1, -container[key], *NUMBERS])
        else:
            container[key] = copy.deepcopy(rng.choice(NODES))
    return config


def damage_bytes(rng, data):
    data = bytearray(data)
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 1:
        position = rng.randrange(len(data))
        return bytes(data[:position] + rng.randbytes(rng.randrange(1, 20)) + data[position:])
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(len(data))] = rng.choice([0, 255, 127, rng.randrange(256)])
    return bytes(data)


def damage_header(rng, data):
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if rng.random() < 0.3:
        # Another name, or two tensors in each other's place
        first, second = rng.choices(list(header), k=2)
        header[first], header[second] = header[second], header[first]
        if rng.random() < 0.5:
            header[rng.choice(STRINGS)] = header.pop(first)
    else:
        header = damage_json(rng, header)
    text = json.dumps(header).encode()
    declared = len(text) if rng.random() < 0.9 else rng.choice([0, 2**20 + 1, 2**40, 2**64 - 1, len(text) + 1])
    return declared.to_bytes(8, "little") + text + data[8 + size :]


def damage(rng, agent, folder):
    """Write a damaged copy. In most cases the hash is made to fit again, as an attacker would."""
    text = (agent / "agent.json").read_text()
    (weights_path,) = agent.glob("*.safetensors")
    weights = weights_path.read_bytes()
    config, kind = json.loads(text), rng.randrange(8)
    if kind < 4:
        text = json.dumps(damage_json(rng, config))
    elif kind == 4:
        text = damage_bytes(rng, text.encode())
    else:
        weights = damage_header(rng, weights) if kind < 7 else damage_bytes(rng, weights)
        if rng.random() < 0.9:
            config["weights_sha256"] = hashlib.sha256(weights).hexdigest()
            text = json.dumps(config)
    (folder / "agent.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    name = f"agent-{config['weights_sha256'][:16]}.safetensors" if kind > 4 else weights_path.name
    (folder / name).write_bytes(weights)


def main(agents, n, seed):
    warnings.simplefilter("ignore")
    watch, rng = Watch(), random.Random(seed)
    folders = sorted(path for path in Path(agents).iterdir() if path.is_dir())
    for folder in folders:
        load_safe(folder, device="cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes, failures = collections.Counter(), []
    parent = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        for index in range(n):
            folder = parent / str(index)
            folder.mkdir()
            damage(rng, rng.choice(folders), folder)
            watch.is_on = True
            try:
                model, _ = load_safe(folder, device="cpu")
                watch.is_on = False
                model.predict(model.observation_space.sample())
                outcomes["loaded"] += 1
            except SafeFormatError as error:
                outcomes[type(error.__cause__).__name__ if error.__cause__ else "refused"] += 1
            except BaseException:
                failures.append(f"{index}: {traceback.format_exc()[-1500:]}")
            watch.is_on = False
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(parent)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"outcomes": outcomes, "failures": failures, "forbidden": watch.seen, "grown_mb": grown}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
