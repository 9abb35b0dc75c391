from sb3_ext.algos.sac_ae.autoencoder import ConvEncoder
from sb3_ext.algos.sac_ae.policies import CnnPolicy
from sb3_ext.algos.sac_ae.reconstructions import ReconstructionCallback
from sb3_ext.algos.sac_ae.sac_ae import SACAE

__all__ = ["SACAE", "CnnPolicy", "ConvEncoder", "ReconstructionCallback"]
