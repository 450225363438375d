"""Teachers: one file per model family; each adds labels to a batch of clips and is never trained."""

TEACHERS = {
    "efficientnet_lite": "vkd.teachers.efficientnet_lite:EfficientNetLiteTeacher",
    "pair_scores": "vkd.teachers.pair_scores:PairScoresTeacher",
    "probe": "vkd.teachers.probe:ProbeTeacher",
    "regions": "vkd.teachers.regions:RegionsTeacher",
    "student": "vkd.teachers.student:StudentTeacher",
}
