"""Figures as pictures, or as tables where no plotting library is."""
