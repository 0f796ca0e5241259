"""`python -m v05`, which torchrun can start too: `torchrun --nproc-per-node 2 -m v05 train ...`."""

from v05.cli import main

if __name__ == "__main__":
    main()
