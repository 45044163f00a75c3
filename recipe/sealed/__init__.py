"""Folders that are whole or absent."""

from recipe.sealed.folder import SEAL, damage, seal, whole_folder

__all__ = ["SEAL", "damage", "seal", "whole_folder"]
