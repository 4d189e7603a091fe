"""What deepspeed, torchrun and srun start on every rank: deepspeed --num_gpus 8 launcher/doctor.py ...."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # this checkout, installed or not

    from adaptive_training import main

    main(["doctor", *sys.argv[1:]])
