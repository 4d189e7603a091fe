"""``python -m adaptive COMMAND``: the same as the ``adaptive`` command."""

from adaptive.commands.main import main

if __name__ == "__main__":
    main()
