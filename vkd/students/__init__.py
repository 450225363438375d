"""Students: one file per model family; small video networks that learn what teachers said."""

STUDENTS = {
    "coarse": "vkd.students.coarse:CoarseStudent",
    "fine": "vkd.students.visil:FineStudent",
    "selector": "vkd.students.selector:Selector",
    "shift_cnn": "vkd.students.shift_cnn:ShiftCNN",
    "tiny_r3d": "vkd.students.tiny_r3d:TinyR3D",
    "tiny_vit": "vkd.students.tiny_vit:TinyViT",
    "visil": "vkd.students.visil:VisilHead",
}
