class VisionLanguageFolder:
    name = "x"; help="x"; priority=0
