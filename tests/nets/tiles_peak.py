"""How many MB the peak of this process rises while 512 px are decoded, by tiles of argv[1] latents, 0: whole."""

import sys

import torch

from tests.nets.test_tiles import codec


def memory(name: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) / 1024


def main() -> None:
    torch.set_num_threads(1)
    made = codec(int(sys.argv[1]) or None, image_size=512, width=16, multipliers=[1, 2, 4, 4])
    made.decode(torch.randn(1, 4, 8, 8))
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # from here on
    before = memory("VmRSS")
    made.decode(torch.randn(1, 4, 64, 64))
    print(memory("VmHWM") - before)


if __name__ == "__main__":
    main()
