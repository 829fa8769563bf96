"""The tables of docs/performance.md, made of the kept records."""

from statistics import mean

from benchmarks import peers_report
from benchmarks.tables import RESULTS, read, table


def performance() -> str:
    """The benchmarks, what was required of them, and whether it holds."""
    kept = read("benchmarks.json")
    now, before = kept["now"], kept["before"]

    def holds(benchmark: str, *names: str) -> str:
        return "yes" if all(now[benchmark]["holds"][name] for name in names or now[benchmark]["holds"]) else "no"

    def images(kind: str) -> str:
        row = now["images"][kind]
        return (
            f"{row['ours_us']:.0f} us; timm {row['timm_us']:.0f}, torchvision {row['torchvision_us']:.0f}: "
            f"{row['times_faster']:.1f} times"
        )

    def two_processes(part: dict) -> str:
        return f"{part['scale']['images_per_second']['2'] / part['scale']['images_per_second']['1']:.2f}"

    def of_each(rows: list[dict], key: str, unit: str) -> str:
        return ", ".join(f"{row[key]:.3g}{unit}" for row in (rows[-1], rows[0]))

    few, *_, many = now["scale"]["images"]
    fewest, *_, most_files = now["growth"]["files"]
    _, some, most_classes = now["growth"]["classes"]
    photo = now["images"]["photographs"]
    once, gib = before["scale"]["load_us"], of_peers("peak_memory_gib")
    least = min(value for name, value in gib.items() if not name.startswith("ours"))
    rows = [
        ("`images`", "an image of 32 px brought to 128", "5 times faster", f"{before['images']['small_us']} us",
         images("small"), holds("images", "small_5_times_faster")),
        ("`images`", "an image of 300 px cropped to 224", "2 times faster", f"{before['images']['large_us']} us",
         images("large"), holds("images", "large_2_times_faster")),
        ("`images`", "decoding a photograph of 3,000 px for 224, `reduced_decode=2`", "-", "-",
         f"{photo['reduced_us'] / 1000:.0f} ms; whole {photo['ours_us'] / 1000:.0f}, timm {photo['timm_us'] / 1000:.0f}: "
         f"{photo['times_faster']:.1f} times", "-"),
        ("`images`", "the same from `--cache`, in a later run", "-", "-",
         f"{photo['kept_us'] / 1000:.1f} ms: {photo['times_faster_kept']:.0f} times", "-"),
        *(
            (
                "`loop`",
                f"`train()` against a bare loop: {case['case']}, {case['processes']} process{'es' * (case['processes'] > 1)}",
                "0.98 of its images/s",
                f"{old['ratio']:.2f}",
                f"{case['ratio']:.2f}",
                holds("loop", f"{case['case']}, {case['processes']} processes"),
            )
            for old, case in zip(before["loop"]["cases"], now["loop"]["cases"], strict=True)
        ),
        ("`frozen`", "memory while only the head trains, of that of all layers (ResNet-18, 128 px)", "40%",
         f"{before['frozen']['memory_share']:.0%}", f"{now['frozen']['memory_share']:.0%}",
         holds("frozen", "memory_at_most_40_percent")),
        ("`frozen`", "a pass over kept features, against computing them", "10 times faster",
         f"{before['frozen']['times_faster']:.0f} times", f"{now['frozen']['times_faster']:.0f} times",
         holds("frozen", "kept_features_10_times_faster")),
        *(
            ("`frozen_views`", f"an epoch, validation included, in which {what} of ResNet-18 train{s} at 128 px", goal, "-",
             f"{now['frozen_views'][stage]['times_faster']} times", holds("frozen_views", held))
            for stage, what, s, goal, held in (
                ("head", "the head", "s", "10 times faster", "head_10_times_faster"),
                ("head and layer4", "head and layer4", "", "3 times faster", "layer4_3_times_faster"),
            )
        ),
        ("`start`", "`--help`, `finetune ls`, an unknown recipe", "0.5 s", f"{max(before['start']['seconds'].values()):.2f} s",
         f"{max(now['start']['seconds'].values()):.2f} s", holds("start", "commands_under_half_a_second")),
        ("`start`", "the quickstart's first step, after its linear probe", "10 s", f"{before['start']['first_step']:.1f} s",
         f"{now['start']['first_step']:.1f} s", holds("start", "first_step_within_10_s")),
        ("`start`", "validation and checkpoints, of the epochs' time", "10%", f"{sum(before['start']['shares'].values()):.1%}",
         f"{sum(now['start']['shares'].values()):.1%}", holds("start", "validation_and_checkpoints_under_a_tenth")),
        ("`predict`", "`predict --output`, images/s, against a bare loop of loader and network", "0.9", "-",
         f"{now['predict']['share_of_bare']:.2f}", holds("predict", "within_10_percent")),
        ("`predict`", f"memory of {now['predict']['many']:,} images, beyond that of one batch", "50 MiB", "-",
         f"{now['predict']['mib'][str(now['predict']['many'])] - now['predict']['mib']['32']} MiB",
         holds("predict", "memory_constant")),
        ("`scale`", "two processes against one on the same two cores, images/s", "0.95", two_processes(before),
         two_processes(now), holds("scale", "two_processes_not_slower")),
        ("`scale`", "loading an image of 1,000,000, against one of 1,000", "1.2 times the time",
         f"{once['1000000']:.0f} us, {once['1000']:.0f} us", f"{many['load_us']:.0f} us, {few['load_us']:.0f} us",
         holds("scale", "loading_time_flat")),
        ("`growth`", f"a start with {most_files['files']:,} files (before: 100,000), against one with {fewest['files']:,}",
         "1.2 times the time a file", of_each(before["growth"]["files"], "us", " us"),
         of_each(now["growth"]["files"], "us", " us"), holds("growth", "start_at_most_linear")),
        *(
            ("`growth`", f"{which} start with {most_files['files']:,} files", "10 s",
             f"{before['growth']['files'][-1]['us'] * most_files['files'] / 1e6:.0f} s, by 100,000",
             f"{most_files[kind]:.1f} s", "yes" if most_files[kind] <= 10 else "no")
            for which, kind in (("the first", "seconds"), ("a later", "later_seconds"))
        ),
        ("`growth`", f"the metrics of {most_classes['classes']:,} classes, against those of {some['classes']:,}",
         "1.2 times the time a class", of_each(before["growth"]["classes"], "seconds", " s"),
         of_each(now["growth"]["classes"][1:], "seconds", " s"), holds("growth", "end_at_most_linear")),
        ("`peers`", "memory of `efficientnet_lite0_cifar`, 128 px, batches of 32",
         f"that of the best other, {least:.2f} GiB", "-", f"{gib['ours']:.2f} GiB", "yes" if gib["ours"] <= least else "no"),
        ("`growth`", f"memory of the metrics of {most_classes['classes']:,} classes, beside the logits of 2,000 images", "-",
         f"{before['growth']['classes'][-1]['mib']:,.0f} MiB", f"{most_classes['mib']:,.0f} MiB", "-"),
    ]  # fmt: skip
    return table("benchmark | what | required | before | now | holds", rows)


def cpu() -> str:
    """What each way to train on a CPU gains, by network."""
    networks = read("cpu.json")["networks"]
    ways = [way for way in next(iter(networks.values()))["ways"] if way != "as it is"]
    rows = [
        (
            f"`{name}`, {row['batch']} images of {row['pixels']} px",
            f"{row['ways']['as it is']['images_per_second']:.0f}",
            *(f"{row['ways'][way]['gain']:.2f}" for way in ways),
        )
        for name, row in networks.items()
    ]
    return table(" | ".join(["network", "images/s", *ways]), rows)


def of_peers(column: str) -> dict[str, float]:
    """A column of each tool's runs with the same network, images and batch: the mean of three seeds."""
    runs = peers_report.read(RESULTS / "peers_memory.jsonl")
    return {
        peer: mean(row[column] for row in runs if row["peer"] == peer) for peer in dict.fromkeys(row["peer"] for row in runs)
    }


def shortfalls() -> str:
    """What is not reached, and what its time or memory goes into."""
    now = read("benchmarks.json")["now"]
    small, layer4, growth = now["images"]["small"], now["frozen_views"]["head and layer4"], now["growth"]["files"][-1]
    speeds = now["scale"]["images_per_second"]
    gib, speed = of_peers("peak_memory_gib"), of_peers("images_per_second")
    own, returned = gib.pop("ours"), gib.pop("ours_memory_returned")
    others = ", ".join(f"{name} {most:.2f}" for name, most in gib.items())

    def parts(row: dict, unit: str) -> str:
        return ", ".join(f"{name} {value:.2g}" for name, value in row.items() if value >= 0.05) + f" {unit}"

    rows = [
        ("a small image, 5 times faster",
         f"With timers in it: {parts(small['parts_us'], 'us')}. A fifth of the next best loader's time is "
         f"{min(small['timm_us'], small['torchvision_us']) / 5:.0f} us."),
        *(
            (f"the loop, {case['case']}, {case['processes']} process{'es' * (case['processes'] > 1)}",
             f"Of {case['step_ms']:.0f} ms, beside the network: {parts(case['parts_ms'], 'ms')}.")
            for case in now["loop"]["cases"] if case["ratio"] < 0.98
        ),
        ("layer4 of ResNet-18, 3 times faster",
         f"With the frozen layers kept, an epoch has {layer4['times_fewer_operations']} times fewer multiplications."),
        ("two processes on two cores",
         f"Two runs at once, of half the batch each, reach {speeds['two apart'] / speeds['1']:.2f} of one with both cores: "
         "each steps the optimizer for all weights. What is left goes with exchanging 45 MB of gradients a step."),
        ("a million files within 10 s, the first time",
         f"Each has {parts(growth['parts_us'], 'us')}, by two cores; a later start need not open those that have not changed."),
        ("memory at most that of other tools",
         f"`efficientnet_lite0_cifar` at 128 px in batches of 32: {own:.2f} GiB; {others}. Freed memory is kept for the next "
         f"step: if the system gets it back at once, it is {returned:.2f} GiB, and "
         f"{speed['ours_memory_returned']:.0f} images/s in place of {speed['ours']:.0f}."),
    ]  # fmt: skip
    return table("not reached | why", rows)


def precision() -> str:
    """Suggested recipes in float32 and in bf16: top-1 of three seeds."""
    rows = []
    half = peers_report.read(RESULTS / "precision.jsonl")
    for images in dict.fromkeys(row["data"] for row in half):
        single = [row for row in peers_report.read(RESULTS / "peers_long.jsonl") if row["data"] == images]
        both = [[row["top1"] for row in kept if row["data"] == images and row["peer"] == "ours"] for kept in (single, half)]
        rows.append((images, *(f"{mean(own):.1%} ({100 * min(own):.1f} to {100 * max(own):.1f})" for own in both)))
    return table("images | float32 | bf16", rows)
