"""MTG-Jamendo: tags of whole tracks, split 0: the 50 most frequent ones, genres, instruments,
moods and themes."""

import functools

from mert_jax.tasks.task import Task, from_jsonl, tags_of

SOURCE = (
    "Download the data set m-a-p/MTG from Hugging Face (huggingface-cli download --repo-type="
    "dataset m-a-p/MTG --local-dir=DIR; it has audio-low/ and MTGTop50.*.jsonl, MTGGenre.*.jsonl "
    "and so on), or the audio with MTG's own scripts, and give --data=DIR."
)


def named(kind: str, names: str) -> tuple[str, ...]:
    """Tags as the tables spell them: kind---name."""
    return tuple(f"{kind}---{name}" for name in names.split())


GENRES = named(
    "genre",
    "rock pop classical popfolk disco funk rnb ambient chillout downtempo easylistening electronic "
    "lounge triphop breakbeat techno newage jazz metal industrial instrumentalrock minimal "
    "alternative experimental drumnbass soul fusion soundtrack electropop world ethno trance "
    "orchestral grunge chanson worldfusion hiphop groove instrumentalpop blues reggae dance club "
    "punkrock folk synthpop poprock choir symphonic indie progressive acidjazz contemporary newwave"
    " dub rocknroll hard hardrock house atmospheric psychedelic improvisation country electronica "
    "rap 60s 70s darkambient idm latin postrock bossanova singersongwriter darkwave swing medieval "
    "celtic eurodance classicrock dubstep bluesrock edm deephouse jazzfusion alternativerock 80s "
    "90s",
)
INSTRUMENTS = named(
    "instrument",
    "voice synthesizer piano strings beat guitar cello keyboard trombone clarinet doublebass horn "
    "trumpet violin accordion bass computer drummachine drums electricguitar sampler "
    "acousticguitar harmonica flute pipeorgan harp electricpiano oboe saxophone percussion "
    "acousticbassguitar orchestra bongo brass viola rhodes organ classicalguitar bell pad",
)
MOODS = named(
    "mood/theme",
    "background film melancholic melodic children relaxing documentary emotional space love drama "
    "adventure energetic heavy dark calm action dramatic epic powerful upbeat slow inspiring soft "
    "meditative fun happy positive romantic sad hopeful motivational deep uplifting ballad "
    "soundscape dream movie fast nature cool corporate travel funny sport commercial advertising "
    "holiday christmas sexy game groovy retro summer party trailer",
)
FREQUENT = (
    *named(
        "genre",
        "rock pop classical popfolk funk ambient chillout downtempo easylistening electronic "
        "lounge triphop techno newage jazz metal alternative experimental soundtrack world trance "
        "orchestral hiphop instrumentalpop reggae dance folk poprock indie house atmospheric",
    ),
    *named(
        "instrument",
        "voice synthesizer piano strings guitar keyboard violin bass computer drummachine drums "
        "electricguitar acousticguitar electricpiano",
    ),
    *named("mood/theme", "film relaxing emotional energetic happy"),
)


def _task(name: str, labels: tuple[str, ...]) -> Task:
    return Task(
        name=name,
        kind="tags",
        labels=labels,
        metrics=("roc_auc", "average_precision"),
        clips=functools.partial(
            from_jsonl, name=name, label=tags_of(labels), seconds=30.0, source=SOURCE
        ),
        seconds=30.0,
        licence="annotations CC BY-NC-SA 4.0; recordings of Jamendo, Creative Commons each",
        source=SOURCE,
        paper="Bogdanov et al., ML4MD at ICML 2019",
    )


TOP50 = _task("MTGTop50", FREQUENT)
GENRE = _task("MTGGenre", GENRES)
INSTRUMENT = _task("MTGInstrument", INSTRUMENTS)
MOOD = _task("MTGMood", MOODS)
