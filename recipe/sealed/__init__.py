"""Folders that are whole or absent."""

from recipe.sealed.folder import SEAL, damage, remove_unfinished, seal, whole_folder

__all__ = ["SEAL", "damage", "remove_unfinished", "seal", "whole_folder"]
