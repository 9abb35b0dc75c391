"""Results of the Optuna studies that hyperparameters come from, one journal each. Installed as ``sb3_ext.optuna_studies``."""
