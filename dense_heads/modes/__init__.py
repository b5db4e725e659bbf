"""The verbs of the command: one file for each."""

MODES = {
    "fit": "train a head, measure it, write the run folder (default)",
    "evaluate": "measure a trained head: model=RUN, on its own or another task=",
    "predict": "model=RUN input=FILE_OR_FOLDER output=FOLDER: label maps and overlays",
    "embed": "input=FILE_OR_FOLDER output=FOLDER: the features that a head would see",
    "sweep": "search any config values: sweep=OPTION; a study on disk, goes on with resume= (extra `sweep`)",
}
PLANNED_MODES = ("export", "doctor")
