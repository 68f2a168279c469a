"""The datasets that MARBLE's jsonl tables describe: EMO, GS, GTZAN, MTG-Jamendo and MTT."""

import functools
from collections.abc import Callable
from typing import Any

from mert_jax.tasks.task import Task, jsonl_task

TONICS = "C Db D Eb E F Gb G Ab A Bb B".split()
KEYS = tuple(f"{tonic} {mode}" for mode in ("major", "minor") for tonic in TONICS)
GENRES = tuple("blues classical country disco hiphop jazz metal pop reggae rock".split())
MTT_TAGS = tuple(
    "guitar,classical,slow,techno,strings,drums,electronic,rock,fast,piano,ambient,beat,violin,"
    "vocal,synth,female,indian,opera,male,singing,vocals,no vocals,harpsichord,loud,quiet,flute,"
    "woman,male vocal,no vocal,pop,soft,sitar,solo,man,classic,choir,voice,new age,dance,"
    "male voice,female vocal,beats,harp,cello,no voice,weird,country,metal,female voice,"
    "choral".split(",")
)
MTG_TAGS = {
    "genre": "rock pop classical popfolk disco funk rnb ambient chillout downtempo easylistening "
    "electronic lounge triphop breakbeat techno newage jazz metal industrial instrumentalrock "
    "minimal alternative experimental drumnbass soul fusion soundtrack electropop world ethno "
    "trance orchestral grunge chanson worldfusion hiphop groove instrumentalpop blues reggae dance "
    "club punkrock folk synthpop poprock choir symphonic indie progressive acidjazz contemporary "
    "newwave dub rocknroll hard hardrock house atmospheric psychedelic improvisation country "
    "electronica rap 60s 70s darkambient idm latin postrock bossanova singersongwriter darkwave "
    "swing medieval celtic eurodance classicrock dubstep bluesrock edm deephouse jazzfusion "
    "alternativerock 80s 90s",
    "instrument": "voice synthesizer piano strings beat guitar cello keyboard trombone clarinet "
    "doublebass horn trumpet violin accordion bass computer drummachine drums electricguitar "
    "sampler acousticguitar harmonica flute pipeorgan harp electricpiano oboe saxophone percussion "
    "acousticbassguitar orchestra bongo brass viola rhodes organ classicalguitar bell pad",
    "mood/theme": "background film melancholic melodic children relaxing documentary emotional "
    "space love drama adventure energetic heavy dark calm action dramatic epic powerful upbeat "
    "slow inspiring soft meditative fun happy positive romantic sad hopeful motivational deep "
    "uplifting ballad soundscape dream movie fast nature cool corporate travel funny sport "
    "commercial advertising holiday christmas sexy game groovy retro summer party trailer",
}
MTG_FREQUENT = {
    "genre": "rock pop classical popfolk funk ambient chillout downtempo easylistening electronic "
    "lounge triphop techno newage jazz metal alternative experimental soundtrack world trance "
    "orchestral hiphop instrumentalpop reggae dance folk poprock indie house atmospheric",
    "instrument": "voice synthesizer piano strings guitar keyboard violin bass computer "
    "drummachine drums electricguitar acousticguitar electricpiano",
    "mood/theme": "film relaxing emotional energetic happy",
}


def _mtg_tags(tags: dict[str, str]) -> tuple[str, ...]:
    return tuple(f"{kind}---{name}" for kind, names in tags.items() for name in names.split())


def _dataset(name: str, licence: str, **about: Any) -> Callable[..., Task]:
    """Return `jsonl_task` for the tasks of a data set on Hugging Face."""
    command = f"huggingface-cli download --repo-type=dataset m-a-p/{name} --local-dir=DIR"
    source = f"Download m-a-p/{name} from Hugging Face ({command}) and give --data=DIR."
    return functools.partial(jsonl_task, source=source, licence=licence, **about)


_emo = _dataset("EMO", "CC BY-NC 3.0 and the licences of the Free Music Archive's recordings")
_gs = _dataset("GS", "annotations CC BY-NC-SA 4.0; the previews are Beatport's: research use")
_gtzan = _dataset("GTZAN", "none stated; the recordings are in copyright: research use")
_mtt = _dataset("MTT", "annotations free for research; recordings of Magnatune, CC BY-NC-SA")
JAMENDO = "annotations CC BY-NC-SA 4.0; recordings of Jamendo, Creative Commons each"
BOGDANOV = "Bogdanov et al., ML4MD at ICML 2019"
_mtg = _dataset("MTG", JAMENDO, kind="tags", seconds=30.0, paper=BOGDANOV)
STURM = "Tzanetakis and Cook, 2002; the split: Sturm, arXiv 1306.1461"
MARCHAND = "Marchand, Fresnel and Peeters, ISMIR 2015 (late breaking)"
TASKS = (
    _emo("EMO", "regression", ("arousal", "valence"), 15.0, paper="Soleymani et al., 2013"),
    # trained on the MTG key set, tested on the tracks of Knees et al.; "ori_uid" names the track
    _gs("GS", "key", KEYS, 30.0, paper="Knees et al., ISMIR 2015", group="ori_uid"),
    # the artist-filtered split; 30.2 s, as in MARBLE, is more than a file has: a file is a clip
    _gtzan("GTZANGenre", "classes", GENRES, 30.2, paper=STURM),
    _gtzan("GTZANBeatTracking", "beats", ("beat",), 10.0, paper=MARCHAND),
    _mtt("MTT", "tags", MTT_TAGS, 30.0, paper="Law et al., ISMIR 2009"),
    # tags of whole tracks, split 0
    _mtg("MTGTop50", labels=_mtg_tags(MTG_FREQUENT)),
    _mtg("MTGGenre", labels=_mtg_tags({"genre": MTG_TAGS["genre"]})),
    _mtg("MTGInstrument", labels=_mtg_tags({"instrument": MTG_TAGS["instrument"]})),
    _mtg("MTGMood", labels=_mtg_tags({"mood/theme": MTG_TAGS["mood/theme"]})),
)
