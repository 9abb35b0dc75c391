"""Model cards for the Hugging Face Hub. Installed as ``sb3_ext.hub``."""
