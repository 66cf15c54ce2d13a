"""Configurations that come with the package, each named by its stem: `lora-engine train demo`."""
