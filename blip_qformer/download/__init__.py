"""Download the published model from the Hugging Face Hub and convert it for ComfyUI.

``hub`` fetches files, ``comfyui`` finds the folders they go to, ``model`` knows which files and what becomes of them.
"""

from .comfyui import ModelFolders, find_comfyui, model_folders
from .hub import DownloadError
from .model import download_model, wanted_files

__all__ = ["DownloadError", "ModelFolders", "download_model", "find_comfyui", "model_folders", "wanted_files"]
