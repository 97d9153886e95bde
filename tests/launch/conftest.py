from tests.launching import launch_python, nemo_home, trd

__all__ = ["launch_python", "nemo_home", "trd"]
