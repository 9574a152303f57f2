"""``python -m cl_lab`` is ``cl-lab``; also what ``accelerate launch -m cl_lab run …`` starts as each rank."""

from cl_lab.cli import main

if __name__ == "__main__":
    main()
