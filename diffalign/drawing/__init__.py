"""Raw picture making: fonts, grids, charts."""
