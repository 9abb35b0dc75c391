"""Tables and figures out of a file of results. Needs the extra ``plots``."""

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.results import Row
from benchmarks.speed import memory_factor, paired_ratio, peers_of

BOOTSTRAP_SAMPLES = 2000

ON_POLICY_TABLES = {
    "collect": (
        "Collecting, steps in the environments per second: `learn` of the same algorithm with `train` left out, with our "
        "collector and with SB3's."
    ),
    "learn": "Learning end to end, steps in the environments per second:",
    "train": (
        "Updates per second: actor and critic trained on one rollout of random numbers with 17 observations and 6 actions, "
        "each update from the same untrained parameters. Values and advantages are computed beforehand."
    ),
}


def interquartile_mean(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    :param scores: (seeds, points)
    :return: For each point: the interquartile mean over the seeds, and the bounds of its 95 % bootstrap interval
    """
    from rliable import library

    def statistic(runs: np.ndarray) -> np.ndarray:
        # What rliable's aggregate_iqm computes point by point, in a fraction of its time
        ordered = np.sort(runs.reshape(-1, runs.shape[-1]), axis=0)
        n_cut = len(ordered) // 4
        return ordered[n_cut : len(ordered) - n_cut].mean(axis=0)

    # rliable draws from numpy's global generator: the same report from the same rows
    np.random.seed(0)
    # (seeds, points) -> (seeds, one task, points)
    points, intervals = library.get_interval_estimates({"": scores[:, None]}, statistic, reps=BOOTSTRAP_SAMPLES)
    return points[""], intervals[""][0], intervals[""][1]


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """:return: the rows by the values of some of their keys, in the order of first appearance"""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def table(header: list[str], lines: Iterable[list[str]]) -> str:
    """:return: a table in Markdown"""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])


def normalized(returns: np.ndarray, data: Row | None) -> np.ndarray | None:
    """
    :param returns: Any shape
    :param data: Description of the data set, see :func:`benchmarks.data.arrays`
    :return: 0 for the data set's lower reference score, 100 for its upper one; None if it has none
    """
    low, high = (data or {}).get("ref_min_score"), (data or {}).get("ref_max_score")
    return None if low is None or high is None else 100 * (returns - low) / (high - low)


def mean_and_error(values: np.ndarray) -> str:
    """:return: the mean over seeds, and its standard error if there are several"""
    error = f" ± {values.std(ddof=1) / np.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{error}"


def curve_line(label: str, rows: list[Row]) -> list[str]:
    """:return: the cells of one curve in the table of returns"""
    rows = sorted(rows, key=lambda row: row["seed"])
    means = np.array([np.mean(row["final_returns"]) for row in rows])
    point, low, high = interquartile_mean(means[:, None])
    scores = normalized(means, rows[0]["data"])
    minutes = statistics.median(row["wall_time_s"] for row in rows) / 60
    return [
        label,
        mean_and_error(means),
        f"{point[0]:.1f} [{low[0]:.1f}, {high[0]:.1f}]",
        "" if scores is None else mean_and_error(scores),
        " ".join(f"{mean:.0f}" for mean in means),
        f"{rows[0]['n_timesteps']:,}",
        f"{minutes:.1f}",
    ]


def data_lines(rows: list[Row]) -> list[str]:
    """:return: one sentence about each data set"""
    data = {row["data"]["id"]: row["data"] for row in rows if row["data"]}
    return [
        f"Data `{name}`: {d['transitions']:,} transitions, {d['episodes']} episodes with a return of {d['mean_return']:.1f} "
        f"± {d['std_return']:.1f} (standard deviation)."
        for name, d in data.items()
    ]


def option_lines(curves: dict[tuple[Any, ...], list[Row]]) -> list[str]:
    """:return: a table of how the agents use their options, of those that have any"""
    uses = {
        label: [row["options"] for row in sorted(rows, key=lambda row: row["seed"]) if "options" in row]
        for (label,), rows in curves.items()
    }
    names = {"usage_entropy": "entropy of usage", "usage_entropy_in_training": "as in training", "duration": "duration"}
    # Older rows lack one of them
    keys = [key for key in names if any(key in use for of_label in uses.values() for use in of_label)]

    def cell(values: list[float]) -> str:
        return f"{statistics.mean(values):.2f} ({' '.join(f'{one:.2f}' for one in values)})" if values else ""

    lines = [
        [label, *(cell([use[key] for use in of_label if key in use]) for key in keys)]
        for label, of_label in uses.items()
        if of_label
    ]
    introduction = (
        "What the agents do with their options, as means over the seeds (each seed): entropy of how often each is in force, "
        "as a fraction of the largest one, and the steps until an option ends. Options act and end as drawn, none at random"
    )
    if "usage_entropy_in_training" in keys:
        introduction += ", but in the second column, for seeds of which it is known, as often as at the end of training"
    return [f"{introduction}.", table(["", *(names[key] for key in keys)], lines)] if lines else []


def soft_value_lines(curves: dict[tuple[Any, ...], list[Row]]) -> list[str]:
    """:return: a table of what the agents expect beside what follows, and of their entropy, of those that have values of it"""
    keys, lines = ("value", "soft_return", "entropy", "entropy_deviation"), []
    for (label,), rows in curves.items():
        measured = [row["soft_values"] for row in rows if "soft_values" in row]
        columns = [[one[key] for one in measured if key in one] for key in keys]
        if measured:
            lines.append([label, *(f"{statistics.mean(column):.2f}" if column else "" for column in columns)])
    introduction = (
        "What the agents expect of their actions (smaller value of the critics), and the discounted rewards that then follow "
        "with the entropy bonuses that their targets contain; the entropy of the policy in the second half of the training, "
        "in nats, and by how much it moves about (standard deviation). Means over the seeds of which they are known, "
        "rewards as in the training."
    )
    return [introduction, table(["", "value", "what follows", "entropy", "deviation"], lines)] if lines else []


def plot(curves: dict[tuple[Any, ...], list[Row]], title: str, path: Path) -> None:
    """
    Learning curves: interquartile means over seeds with 95 % bootstrap intervals, and the mean returns of the data.

    :param curves: Rows by label
    :param title: Of the figure
    :param path: PNG to write
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (label,), rows in curves.items():
        scores = np.array([np.mean(row["eval_returns"], axis=1) for row in rows])
        point, low, high = interquartile_mean(scores)
        (line,) = axes.plot(rows[0]["eval_steps"], point, marker=".", label=label)
        axes.fill_between(rows[0]["eval_steps"], low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    every_row = [row for rows in curves.values() for row in rows]
    means = {row["data"]["id"]: row["data"]["mean_return"] for row in every_row if row["data"]}
    for (name, mean), style in zip(means.items(), ("--", ":", "-.", (0, (1, 4))), strict=False):
        axes.axhline(mean, color="black", linestyle=style, linewidth=1, label=f"mean of {name}")
    offline = all(row["data"] for row in every_row)
    axes.set(title=title, xlabel="gradient updates" if offline else "environment steps", ylabel="return")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def provenance(rows: list[Row], key: str) -> str:
    """
    :param rows: Of one section
    :param key: Of the commands that made them
    :return: Commands, commits, machines, and of each package the latest version
    """
    latest = {name: number for row in rows for name, number in row["versions"].items()}
    versions = ", ".join(f"{name} {number}" for name, number in latest.items())
    commits, machines = (", ".join(dict.fromkeys(row[name] for row in rows)) for name in ("commit", "machine"))
    commands = "\n".join(dict.fromkeys(row[key] for row in rows))
    return f"```sh\n{commands}\n```\n\nCommit {commits}; {versions}; {machines}."


def returns_section(title: str, rows: list[Row], figure: Path) -> str:
    """:return: table, figure and provenance of one study in one environment"""
    curves = grouped(rows, "label")
    plot(curves, title, figure)
    header = ["", "return", "interquartile mean", "normalised", "each seed", "steps", "minutes"]
    lines = [curve_line(label, of_label) for (label,), of_label in curves.items()]
    if not any(row["data"] for row in rows):
        # Scores are normalised by the data, and there are none
        header, *lines = ([*cells[:3], *cells[4:]] for cells in [header, *lines])
    n_episodes = rows[0]["settings"]["n_episodes"]
    return "\n\n".join(
        [
            f"### {title}",
            f"Mean return of {n_episodes} episodes at the end of training, ± standard error over the seeds; interquartile "
            "mean with its 95 % bootstrap interval.",
            table(header, lines),
            *option_lines(curves),
            *soft_value_lines(curves),
            *data_lines(rows),
            # From docs/results as well as from a page of docs/algos that includes this one
            f"![Learning curves: {title}](../results/{figure.name})",
            provenance(rows, "benchmark"),
        ]
    )


def against(rates: dict[str, list[float]], peers: list[str]) -> list[str]:
    """:return: our median rate, and each peer's with the median of the paired ratios"""
    ours = rates["ours"]
    others = (
        f"{statistics.median(rates[p]):.1f} (**{paired_ratio(ours, rates[p]):.2f} x**)" if p in rates else "" for p in peers
    )
    return [f"{statistics.median(ours):.1f}", *others]


def latest_speeds(rows: list[Row]) -> list[Row]:
    """:return: the latest measurement of each case and number of threads on each machine: ratios differ between processors"""
    return [group[-1] for group in grouped(rows, "case", "threads", "machine").values()]


def circumstances(row: Row) -> list[str]:
    """:return: the first cells of a line in a table of speeds"""
    processor, _cores, _system = row["machine"].rsplit(", ", 2)
    return [row["case"], processor, str(row["threads"])]


def speed_section(rows: list[Row]) -> str:
    """:return: tables of the latest measurements"""
    latest = latest_speeds(rows)
    peers = list(dict.fromkeys(peer for row in latest for peer in peers_of(row)))
    updates, acts, peaks = [], [], []
    for row in latest:
        name, rates = circumstances(row), row["updates_per_s"]
        bound = statistics.median(rates["arithmetic"])
        share = f"{bound:.1f} ({paired_ratio(rates['ours'], rates['arithmetic']):.2f})"
        updates.append([*name, *against(rates, peers), share, f"{bound * row['gflop']:.0f}"])
        acts.append([*name, *against(row["observations_per_s"], peers)])
        peaks.append(
            [*name, *(f"{row['peak_bytes'][who] / 1e6:.0f}" if who in row["peak_bytes"] else "" for who in ("ours", *peers))]
        )
    header = ["case", "processor", "threads", "ours", *peers]
    return "\n\n".join(
        [
            "### Speed",
            "Updates per second, batches sampled from a filled buffer. Long-lived processes take turns; medians of the rounds "
            "and in brackets the median of the ratios within a round (ours / theirs). The bound is a process that does "
            "nothing but the matrix products and convolutions that one update cannot do without, with torch's default "
            "routines; our share of it in brackets. It exceeds 1 where oneDNN, which we call for large products on "
            "processors with AVX-512, beats those.",
            table([*header, "bound (share)", "GFLOP/s of the bound"], updates),
            "Observations per second when acting on batches of 16:",
            table(header, acts),
            "Peak memory of these processes in MB, interpreter and libraries included:",
            table(header, peaks),
            provenance(latest, "command"),
        ]
    )


def on_policy_section(rows: list[Row]) -> str:
    """:return: tables of the latest measurements, with the algorithms that were compared"""
    latest = latest_speeds(rows)
    parts = []
    for (measured,), of_measured in grouped(latest, "measured").items():
        peers = list(dict.fromkeys(name for row in of_measured for name in row["rates"] if name != "ours"))
        lines = []
        for row in of_measured:
            names = [row["specs"][name]["algo"] if name in row["specs"] else "" for name in ("ours", *peers)]
            rates = against(row["rates"], peers)
            cells = [f"{name} {rate}".strip() for name, rate in zip(names, rates, strict=True)]
            lines.append([*circumstances(row), *cells])
        parts += [ON_POLICY_TABLES[measured], table(["case", "processor", "threads", "ours", *peers], lines)]
    return "\n\n".join(
        [
            "### Speed",
            "Long-lived processes take turns; medians of the rounds and in brackets the median of the ratios within a round "
            "(ours / theirs). The cases are rows of `benchmarks/cases.py`.",
            *parts,
            provenance(latest, "command"),
        ]
    )


def memory_section(rows: list[Row]) -> str:
    """:return: table of the latest measurements of memory"""
    latest = [group[-1] for group in grouped(rows, "case", "transitions").values()]
    lines = (
        [
            row["case"],
            f"{row['transitions']:,}",
            *(f"{row[key] / 1e6:.0f}" for key in ("transition_bytes", "startup_bytes", "peak_bytes")),
            f"{memory_factor(row):.2f}",
        ]
        for row in latest
    )
    header = ["case", "transitions", "their MB", "start-up MB", "peak MB", "(peak - start-up) / transitions"]
    return "\n\n".join(
        [
            "### Memory",
            "Peak resident size of a process that reads a Minari data set and trains on it. The bytes of the transitions "
            "count observation, next observation, action, reward and terminal as float32; the start-up size is the peak of "
            "the same process with one episode.",
            table(header, lines),
            provenance(latest, "command"),
        ]
    )


def four_rooms_section(rows: list[Row], path: Path) -> str:
    """:return: table of episode lengths before and after the goal moves, and the name of the figure"""
    from benchmarks.four_rooms import GOAL_MOVES_AFTER, WINDOWS

    by_label = grouped(rows, "label")
    lines = []
    for (label,), of_label in by_label.items():
        lengths = np.array([row["lengths"] for row in of_label])
        windows = [mean_and_error(lengths[:, first:last].mean(axis=1)) for first, last in WINDOWS]
        lines.append(
            [label, str(len(of_label)), *windows, f"{statistics.median(row['wall_time_s'] for row in of_label) / 60:.1f}"]
        )
    plot_lengths(by_label, GOAL_MOVES_AFTER, path)
    header = ["", "seeds", *(f"episodes {first} to {last}" for first, last in WINDOWS), "minutes"]
    return "\n\n".join(
        [
            "### Four Rooms",
            f"Mean steps to the goal, which moves after episode {GOAL_MOVES_AFTER} (± standard error over the seeds).",
            table(header, lines),
            f"![Steps to the goal](../results/{path.name})",
            provenance(rows, "command"),
        ]
    )


def plot_lengths(by_label: dict[tuple[Any, ...], list[Row]], moves_after: int, path: Path) -> None:
    """
    Steps to the goal, as means over seeds and 20 episodes.

    :param by_label: Rows by label
    :param moves_after: The episode after which the goal moves
    :param path: PNG to write
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (label,), rows in by_label.items():
        lengths = np.mean([row["lengths"] for row in rows], axis=0)
        smooth = lengths[: len(lengths) // 20 * 20].reshape(-1, 20).mean(axis=1)
        axes.plot(20 * np.arange(len(smooth)) + 10, smooth, label=label)
    axes.axvline(moves_after, color="black", linestyle="--", linewidth=1)
    axes.set(title="FourRooms-v0", xlabel="episode", ylabel="steps to the goal", yscale="log")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def frames_section(rows: list[Row]) -> str:
    """:return: table of the latest measurement of the replay buffer that stores every frame once"""
    row = rows[-1]
    rates, adds = row["batches_per_s"], row["adds_per_s"]
    ours, sb3 = (statistics.median(rates[name]) for name in ("ours", "sb3"))
    lines = [
        [f"arrays for {row['transitions']:,} transitions", f"{row['array_bytes'] / 1e9:.2f} GB", ""],
        ["growth of the process while they were filled", f"{row['resident_bytes'] / 1e9:.2f} GB", ""],
        [
            "arrays for 1,000,000 transitions",
            f"{row['array_bytes_of_a_million'] / 1e9:.2f} GB",
            f"{row['sb3_bytes_of_a_million'] / 1e9:.2f} GB",
        ],
        ["batches of 32 per second", f"{ours:.0f} ({paired_ratio(rates['ours'], rates['sb3']):.2f})", f"{sb3:.0f}"],
        ["transitions added per second", f"{adds['ours']:.0f} ({adds['ours'] / adds['sb3']:.2f})", f"{adds['sb3']:.0f}"],
    ]
    return "\n\n".join(
        [
            "### Replay memory for stacked frames",
            "4 x 84 x 84 bytes, episodes of 500 steps; batches and additions are measured on "
            f"{row['sampled_from']:,} transitions, in turns, with the ratio in brackets.",
            table(["", "FrameReplayBuffer", "SB3's ReplayBuffer"], lines),
            provenance([row], "command"),
        ]
    )


def precision_section(rows: list[Row]) -> str:
    """:return: tables of the latest measurement of what mixed precision changes"""
    from benchmarks.precision import fit_interval

    row = rows[-1]
    choices = row["choices"]
    parts = [
        [part, *(f"{one[key]:.4f}" for key in ("mean", "noise", "error", "bias"))] for part, one in row["gradients"].items()
    ]
    fits = [
        [name, *(" ".join(f"{error:.3f}" for error in errors) for errors in zip(*of_seeds, strict=True))]
        for name, of_seeds in row["fit_errors"].items()
    ]
    updates = [f"{point * fit_interval(row['updates']):,} updates" for point in range(len(fits[0]) - 1)]
    return "\n\n".join(
        [
            "### Mixed precision",
            f"An agent of Dueling DDQN after {row['trained_steps']:,} steps of {row['env']} (44 x 44) in single precision. In "
            f"{choices['agreement']:.1%} of its states the same network chooses the same action in mixed precision. By the "
            f"values in single precision, these choices lose {choices['loss']:.1e} on average, random ones "
            f"{choices['advantage']:.2f}.",
            "Gradients of batches of 32, by part of the network: norm of their mean in single precision; root mean square "
            "distances of each from that mean (noise), and of those in mixed precision from those in single (error); norm of "
            "the mean of that difference (bias):",
            table(["", "mean", "noise", "error", "bias"], parts),
            f"Networks that learn the targets of that agent, which stay as they are, on {row['transitions']:,} transitions: "
            "mean squared errors over the variance of the targets, of each seed. Both precisions have the same batches.",
            table(["precision", *updates], fits),
            provenance([row], "command"),
        ]
    )


def gpu_section(rows: list[Row]) -> str:
    """:return: table of the latest measurement on each GPU"""
    ways = {"graph": "CUDA graph", "searched": "fastest convolutions", "tf32": "TF32 products, too"}
    latest = [group[-1] for group in grouped(rows, "case", "gpu").values()]
    lines = []
    for row in latest:
        rates = row["updates_per_s"]
        line = [row["case"], row["gpu"], f"{statistics.median(rates['eager']):.0f}"]
        for way in ways:
            ratio = f"{paired_ratio(rates[way], rates['eager']):.2f}" if way in rates else ""
            line.append(ratio and f"{statistics.median(rates[way]):.0f} (**{ratio} x**)")
        lines.append([*line, f"{row['peak_bytes'] / 1e6:.0f}"])
    return "\n\n".join(
        [
            "### Speed on a GPU",
            "Updates per second, launched kernel by kernel and as a CUDA graph, both with the deterministic convolutions that "
            "SB3 sets with a seed; as a graph with the fastest ones that cuDNN finds, and with products of matrices in TF32, "
            "too. The highest sum of tensors on the GPU is that of the first two models together.",
            table(["case", "GPU", "eager", *ways.values(), "peak MB"], lines),
            provenance(latest, "command"),
        ]
    )


def write(path: Path, folder: Path) -> Path:
    """
    :param path: File of results
    :param folder: For the page, named as the file, and its figures
    :return: The page
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = grouped(results.read(path), "kind")
    sections = []
    for (study, env), of_study in grouped(rows.get(("returns",), []), "study", "env").items():
        # As the zoo names the folders of such environments
        figure = folder / f"{path.stem}-{study}-{env.replace('/', '-')}.png"
        sections.append(returns_section(env if study == "default" else f"{env}: {study}", of_study, figure))
    makers: dict[str, Callable[[list[Row]], str]] = {
        "speed": speed_section,
        "on-policy speed": on_policy_section,
        "memory": memory_section,
        "frames": frames_section,
        "precision": precision_section,
        "gpu": gpu_section,
    }
    if ("four rooms",) in rows:
        sections.append(four_rooms_section(rows[("four rooms",)], folder / f"{path.stem}-four-rooms.png"))
    sections += [make(rows[(kind,)]) for kind, make in makers.items() if (kind,) in rows]
    page = folder / f"{path.stem}.md"
    page.write_text("\n\n".join(sections) + "\n")
    return page
