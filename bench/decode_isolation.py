"""What the child process costs: CPU seconds of guarded decoding against the same decoding in this process.

    python bench/decode_isolation.py --json         overhead: guarded / in process - 1, the median of pairs measured in turns

Both arms decode the same real clips in calls of `--clips-per-call`, with the same decoder. CPU seconds of the guarded arm are those
of the parent and of its child; the child's start is paid once a thousand clips and stands apart. `--folder natural` has other clips.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from measure import arguments, corpus, finish, spread

import psutil  # isort: skip

from vkd.clips import Clip, Sampling, View
from vkd.errors import VideoError
from vkd.video.decode import decode_clip
from vkd.video.guard import Guard
from vkd.video.settings import Settings

SAMPLING = Sampling(num_frames=8, size_px=224)


def main() -> None:
    options = arguments(__doc__ or "", repeats=7, clips_per_call=8, calls=8, folder="wagon", backend="auto")
    clips = clips_of(options.folder)[: options.calls * options.clips_per_call]
    calls = [clips[start : start + options.clips_per_call] for start in range(0, len(clips), options.clips_per_call)]
    settings = Settings((SAMPLING,), options.backend)
    in_process(calls[:1], settings)  # imports, and the files into the page cache
    decoder, start_cpu_s, start_s = started(settings, calls[0])
    pairs = []
    for repeat in range(options.repeats):
        arms = {"guarded": lambda: guarded(decoder, calls), "alone": lambda: in_process(calls, settings)}
        order = list(arms) if repeat % 2 else list(arms)[::-1]
        pairs.append({name: arms[name]() for name in order})
        print(f"repeat {repeat}: guarded {pairs[-1]['guarded']:.3f} CPU s, in process {pairs[-1]['alone']:.3f}", flush=True)
    decoder.close()
    ratios = [pair["guarded"] / pair["alone"] - 1 for pair in pairs]
    finish(
        {
            "clips": len(clips),
            "clips_per_call": options.clips_per_call,
            "child_start_cpu_s": start_cpu_s,
            "child_start_s": start_s,
            "cpu_ms_per_clip_guarded": 1000 * statistics.median(pair["guarded"] for pair in pairs) / len(clips),
            "cpu_ms_per_clip_in_process": 1000 * statistics.median(pair["alone"] for pair in pairs) / len(clips),
            "overhead_spread": spread(ratios),
            "overhead": statistics.median(ratios),
        },
        options.json,
    )


def clips_of(folder: str) -> list[Clip]:
    """The clips of one folder of the corpus, whole, in the order of its list."""
    paths = (line.split("\t")[0] for line in (corpus() / "MANIFEST.tsv").read_text().splitlines()[1:])
    return [Clip(str(corpus() / path), 0.0, None, View(), path) for path in paths if path.startswith(f"{folder}/")]


def started(settings: Settings, clips: Sequence[Clip]) -> tuple[Guard, float, float]:
    """A guard whose child has decoded, and the CPU and wall seconds of the child's start."""
    decoder, before_cpu_s, started_s = Guard(settings), cpu_s(), time.monotonic()
    decoder.probe(clips[0].uri)
    start_cpu_s, start_s = cpu_s(decoder) - before_cpu_s, time.monotonic() - started_s
    guarded(decoder, [clips])
    return decoder, start_cpu_s, start_s


def guarded(decoder: Guard, calls: Sequence[Sequence[Clip]]) -> float:
    """CPU seconds of this process and the child."""
    before_s = cpu_s(decoder)
    for clips in calls:
        frames = [answer for answer in decoder.decode(clips) if not isinstance(answer, VideoError)]
        assert len(frames) == len(clips)
    return cpu_s(decoder) - before_s


def in_process(calls: Sequence[Sequence[Clip]], settings: Settings) -> float:
    """CPU seconds of the same in this process."""
    before_s = cpu_s()
    for clips in calls:
        frames = [decode_clip(clip, settings.samplings, settings.backend) for clip in clips]
        assert len(frames) == len(clips)
    return cpu_s() - before_s


def cpu_s(decoder: Guard | None = None) -> float:
    """CPU seconds that this process has spent, and the child of a guard."""
    child = None if decoder is None else decoder._child
    times = [psutil.Process().cpu_times()] + ([] if child is None else [psutil.Process(child.process.pid).cpu_times()])
    return float(sum(each.user + each.system for each in times))


if __name__ == "__main__":
    main()
