"""cl-lab: a laboratory for continual learning and model editing.

Importing this package is cheap: nothing heavy (torch, Avalanche, MLflow) is loaded until a run needs it.
"""

__version__ = "0.1.0"
