"""The table of docs/performance.md, made of the kept records."""

from benchmarks.tables import read, table


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
    once = before["scale"]["load_us"]
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
        ("`growth`", f"a start with {most_files['files']:,} files, against one with {fewest['files']:,}",
         "1.2 times the time a file", of_each(before["growth"]["files"], "us", " us"),
         of_each(now["growth"]["files"], "us", " us"), holds("growth", "start_at_most_linear")),
        ("`growth`", f"the metrics of {most_classes['classes']:,} classes, against those of {some['classes']:,}",
         "1.2 times the time a class", of_each(before["growth"]["classes"], "seconds", " s"),
         of_each(now["growth"]["classes"][1:], "seconds", " s"), holds("growth", "end_at_most_linear")),
        ("`growth`", f"memory of the metrics of {most_classes['classes']:,} classes, beside the logits of 2,000 images", "-",
         f"{before['growth']['classes'][-1]['mib']:,.0f} MiB", f"{most_classes['mib']:,.0f} MiB", "-"),
    ]  # fmt: skip
    return table("benchmark | what | required | before | now | holds", rows)
