"""Recipes: one method in one file; a frozen config whose fields are the method's hyper-parameters."""

RECIPES = {
    "dns": "vkd.recipes.dns:DnS",
    "kd": "vkd.recipes.kd:KD",
    "label": "vkd.recipes.label:Label",
    "substage": "vkd.recipes.substage:Substage",
}
