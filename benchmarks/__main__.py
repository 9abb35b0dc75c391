import argparse
from pathlib import Path

from benchmarks import agents as agents_module
from benchmarks import cases, four_rooms, results
from benchmarks.peers import DEFAULT_FOLDER, PEERS, install


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """:return: the arguments; ``verb`` names the function of this module that takes them"""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Remakes the figures of the documentation.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    # Shared by the verbs that need the peers
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument("--dir", type=Path, default=DEFAULT_FOLDER, help="folder of the peers' virtual environments")

    verb = verbs.add_parser("peers", parents=[folder], help="make one virtual environment for each peer")
    verb.add_argument("--names", nargs="+", default=list(PEERS), choices=list(PEERS), help="default: all")

    verb = verbs.add_parser("returns", parents=[folder], help="train, evaluate, and keep one row for each run")
    verb.add_argument("--algos", nargs="+", required=True, help="keys in the zoo")
    verb.add_argument("--envs", nargs="+", required=True, help="environment ids")
    verb.add_argument("--seeds", type=int, default=10, help="number of seeds")
    verb.add_argument("--first-seed", type=int, default=1)
    verb.add_argument("--study", default="default", help="runs of one study and environment share a figure")
    verb.add_argument("--label", help="name of the curve (default: the algorithm)")
    verb.add_argument("--dataset", help="Minari id (default: the one in the hyperparameters)")
    verb.add_argument("-n", "--n-timesteps", type=int, help="default: as in the hyperparameters")
    verb.add_argument("-params", "--params", nargs="+", default=[], help="key:value, as in the zoo")
    verb.add_argument("--env-kwargs", nargs="+", default=[], help="key:value, as in the zoo")
    verb.add_argument("--evaluations", type=int, default=10, help="points of the learning curve")
    verb.add_argument("--episodes", type=int, default=100, help="episodes of the final evaluation")
    verb.add_argument("--controls", action="store_true", help="also behaviour cloning and plain DQN or DDPG on the same data")
    verb.add_argument("--peers", nargs="+", default=[], choices=list(PEERS), help="also these, on the same data if any")
    verb.add_argument("--only-others", action="store_true", help="the controls and the peers without the algorithm itself")
    verb.add_argument("--page", help="file of results (default: the one that the algorithm belongs to)")
    verb.add_argument("--jobs", type=int, default=1, help="runs at a time")

    verb = verbs.add_parser("speed", parents=[folder], help="time against the peers, in turns")
    names = [case.name for case in cases.ALL_CASES]
    verb.add_argument("--cases", nargs="+", default=names, choices=names, metavar="CASE", help="default: all of the pages")
    pages = list(dict.fromkeys(results.page_of(case.algo) for case in cases.ALL_CASES))
    verb.add_argument("--pages", nargs="+", default=pages, choices=pages, help="default: all")
    verb.add_argument("--threads", nargs="+", type=int, default=[1])
    verb.add_argument("--rounds", type=int, default=7)
    verb.add_argument("--seconds", type=float, default=1.0, help="of one measurement")
    verb.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), help="default: all")

    verb = verbs.add_parser("memory", help="peak memory of training on many transitions")
    verb.add_argument("--case", default=cases.CASES[0].name, choices=[case.name for case in cases.CASES])
    verb.add_argument("--transitions", type=int, default=1_000_000)
    verb.add_argument("--updates", type=int, default=50)

    verb = verbs.add_parser("frames", help="memory and time of the replay buffer that stores every frame once")
    verb.add_argument("--transitions", type=int, default=200_000, help="whose memory is measured")
    verb.add_argument("--sampled-from", type=int, default=20_000, help="transitions in the buffers that are sampled from")
    verb.add_argument("--rounds", type=int, default=7)
    verb.add_argument("--seconds", type=float, default=1.0, help="of one measurement")

    verb = verbs.add_parser("precision", help="what mixed precision changes in choices, gradients and fits, on Pong")
    verb.add_argument("--training", type=int, default=100_000, help="steps of the agent, in single precision")
    verb.add_argument("--transitions", type=int, default=12_000, help="that it collects afterwards")
    verb.add_argument("--updates", type=int, default=3000, help="of each network that is fitted")
    verb.add_argument("--seeds", type=int, default=3, help="of networks and batches")

    verb = verbs.add_parser("gpu", help="updates of SAC-AE on a GPU, with and without a CUDA graph; does nothing without one")
    verb.add_argument("--rounds", type=int, default=7)
    verb.add_argument("--updates", type=int, default=200, help="of one measurement")

    verb = verbs.add_parser("rooms", help="Option-Critic, a flat actor-critic and SARSA where the goal moves")
    verb.add_argument(
        "--labels", nargs="+", default=list(four_rooms.AGENTS), choices=list(four_rooms.AGENTS), help="default: all"
    )
    verb.add_argument("--seeds", type=int, default=20, help="number of seeds")
    verb.add_argument("--first-seed", type=int, default=1)
    verb.add_argument("--episodes", type=int, default=four_rooms.N_EPISODES)

    verb = verbs.add_parser("agents", help="train the agents of hub/agents and write their cards")
    verb.add_argument("--algos", nargs="+", default=list(agents_module.ENVIRONMENTS), choices=list(agents_module.ENVIRONMENTS))

    verb = verbs.add_parser("report", help="tables and figures out of the results, into docs/results")
    verb.add_argument("--out", type=Path, default=results.PROJECT / "docs" / "results")

    verbs.add_parser("startup", help="what the start-up hook adds to an interpreter's start", add_help=False)
    known, rest = parser.parse_known_args(arguments)
    if rest and known.verb != "startup":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    known.rest = rest
    return known


def peers(args: argparse.Namespace) -> None:
    install(args.dir, args.names)


def returns(args: argparse.Namespace) -> None:
    from benchmarks.returns import Run, controls, run_all
    from benchmarks.returns import peers as in_peers

    by_page: dict[str, list[Run]] = {}
    for algo in args.algos:
        runs = by_page.setdefault(args.page or results.page_of(algo), [])
        for env in args.envs:
            for seed in range(args.first_seed, args.first_seed + args.seeds):
                run = Run(
                    study=args.study,
                    label=args.label or algo,
                    contender="zoo",
                    algo=algo,
                    env=env,
                    seed=seed,
                    dataset=args.dataset,
                    params=tuple(args.params),
                    env_kwargs=tuple(args.env_kwargs),
                    n_timesteps=args.n_timesteps,
                    n_evaluations=args.evaluations,
                    n_episodes=args.episodes,
                )
                runs += [] if args.only_others else [run]
                runs += (controls(run) if args.controls else []) + in_peers(run, args.peers)
    for page, runs in by_page.items():
        run_all(runs, page, args.dir, args.jobs)


def speed(args: argparse.Namespace) -> None:
    from benchmarks.speed import measure, measure_on_policy, summary

    for case in map(cases.by_name, args.cases):
        page = results.page_of(case.algo)
        for threads in args.threads if page in args.pages else []:
            how = args.dir, threads, args.seconds, args.rounds, args.peers
            row = measure(case, *how) if isinstance(case, cases.Case) else measure_on_policy(case, *how)
            results.append(results.path_of(page), row)
            print(summary(row), flush=True)


def memory(args: argparse.Namespace) -> None:
    from benchmarks.speed import memory as measure
    from benchmarks.speed import summary

    case = next(case for case in cases.CASES if case.name == args.case)
    row = measure(case, args.transitions, args.updates)
    results.append(results.path_of(results.page_of(case.algo)), row)
    print(summary(row))


def frames(args: argparse.Namespace) -> None:
    from benchmarks.frames import measure, summary

    row = measure(args.transitions, args.sampled_from, args.rounds, args.seconds)
    results.append(results.path_of("q_learning"), row)
    print(summary(row))


def precision(args: argparse.Namespace) -> None:
    from benchmarks.precision import measure, summary

    row = measure(args.training, args.transitions, args.updates, args.seeds)
    results.append(results.path_of("q_learning"), row)
    print(summary(row))


def gpu(args: argparse.Namespace) -> None:
    from benchmarks.gpu import measure, summary

    row = measure(args.updates, args.rounds)
    if row is None:
        print("There is no GPU here: nothing to measure.")
        return
    results.append(results.path_of("sac_ae"), row)
    print(summary(row))


def rooms(args: argparse.Namespace) -> None:
    four_rooms.run_missing(args.labels, range(args.first_seed, args.first_seed + args.seeds), args.episodes)


def agents(args: argparse.Namespace) -> None:
    agents_module.make(args.algos)


def report(args: argparse.Namespace) -> None:
    from benchmarks.report import write

    for path in sorted(results.FOLDER.glob("*.jsonl")):
        print(write(path, args.out))


def startup(args: argparse.Namespace) -> None:
    from benchmarks.startup import main

    main(args.rest)


if __name__ == "__main__":
    parsed = parse()
    globals()[parsed.verb](parsed)
