"""The hand-written lexicon: about a thousand keywords, each of one group (a genre, an era or a tag) and one kind.

A keyword is a short adjective ("eerie") or a noun phrase ("haunted houses") that a prompt may ask for. Every keyword
belongs to exactly one group, so that "does this keyword suit this movie" has one answer:

- genre keywords suit the movies of their genre,
- era keywords suit the movies of their years,
- tag keywords suit the movies that MovieLens users gave that tag.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

Kind = Literal["adjective", "noun"]

#: MovieLens genre -> the one word by which sentences name it (always usable as "this <word> film").
GENRE_NAMES: dict[str, str] = {
    "Action": "action",
    "Adventure": "adventure",
    "Animation": "animated",
    "Children": "family",
    "Comedy": "comedy",
    "Crime": "crime",
    "Documentary": "documentary",
    "Drama": "drama",
    "Fantasy": "fantasy",
    "Film-Noir": "noir",
    "Horror": "horror",
    "Musical": "musical",
    "Mystery": "mystery",
    "Romance": "romance",
    "Sci-Fi": "sci-fi",
    "Thriller": "thriller",
    "War": "war",
    "Western": "western",
}

GENRES: tuple[str, ...] = tuple(GENRE_NAMES)

#: Era -> (first year, last year, how sentences name it).
ERAS: dict[str, tuple[int, int, str]] = {
    "1940s": (0, 1949, "the forties or before"),
    "1950s": (1950, 1959, "the fifties"),
    "1960s": (1960, 1969, "the sixties"),
    "1970s": (1970, 1979, "the seventies"),
    "1980s": (1980, 1989, "the eighties"),
    "1990s": (1990, 1999, "the nineties"),
    "2000s": (2000, 2009, "the two-thousands"),
    "2010s": (2010, 9999, "the twenty-tens"),
}

_GENRE_ADJECTIVES: dict[str, str] = {
    "Action": "explosive, hard-hitting, high-octane, adrenaline-fuelled, bruising, bullet-riddled, breakneck, "
    "muscular, "
    "rip-roaring, relentless, two-fisted, turbocharged, pulse-pounding, ferocious, bone-crunching, punchy, kinetic, "
    "guns-blazing, full-throttle, daredevil",
    "Adventure": "swashbuckling, globe-trotting, intrepid, adventurous, far-flung, questing, seafaring, "
    "treasure-hunting, "
    "daring, rollicking, perilous, exploratory, wide-ranging, valiant, plucky, wandering, untamed, trailblazing, "
    "jungle-trekking, fearless",
    "Animation": "hand-drawn, colourful, cartoonish, rubbery, inky, stop-motion, computer-drawn, vividly painted, "
    "bouncy, pastel, elastic, brightly coloured, squishy, richly illustrated, frame-by-frame, wide-eyed, plasticine, "
    "doodled, crayon-bright, pixel-perfect",
    "Children": "child-friendly, wholesome, cuddly, innocent, kid-sized, cheerful, gentle, all-ages, sugary, "
    "good-hearted, "
    "bedtime, storybook, playful, sweet-natured, mischievous, sunny, cosy, nursery, schoolyard, giggly",
    "Comedy": "hilarious, funny, witty, goofy, zany, laugh-out-loud, slapstick, wisecracking, madcap, silly, absurd, "
    "deadpan, droll, rib-tickling, farcical, tongue-in-cheek, irreverent, screwball, side-splitting, wry",
    "Crime": "criminal, crooked, mob-run, underworld, corrupt, streetwise, lawless, gangland, felonious, shady, "
    "double-dealing, seedy, cutthroat, ill-gotten, thieving, bent, hard-bitten, racketeering, outlaw, dirty-handed",
    "Documentary": "factual, investigative, true-life, candid, journalistic, eye-opening, informative, unscripted, "
    "well-researched, observational, fly-on-the-wall, educational, archival, non-fiction, revealing, first-hand, "
    "muckraking, sober, instructive, undoctored",
    "Drama": "moving, poignant, heartfelt, dramatic, emotional, tearful, bittersweet, sombre, serious, weighty, "
    "character-driven, soul-searching, intimate, melancholy, heart-rending, tender-hearted, unflinching, wrenching, "
    "stirring, introspective",
    "Fantasy": "magical, enchanted, fantastical, mythical, otherworldly, fairy-tale, spellbinding, bewitched, "
    "wondrous, "
    "legendary, dragon-filled, mystical, elfin, sorcerous, fabled, dreamlike, charmed, make-believe, shape-shifting, "
    "whimsical",
    "Film-Noir": "smoky, shadowy, fatalistic, hard-boiled, rain-slicked, cynical, moonlit, venetian-blinded, "
    "world-weary, "
    "doom-laden, trench-coated, dimly lit, jaded, backstreet, chain-smoking, double-crossing, low-lit, bourbon-soaked, "
    "nocturnal, treacherous",
    "Horror": "eerie, terrifying, blood-soaked, ghoulish, nightmarish, spine-chilling, macabre, gruesome, creepy, "
    "haunted, "
    "ghastly, monstrous, hair-raising, demonic, gory, sinister, unholy, skin-crawling, cursed, spooky",
    "Musical": "toe-tapping, tuneful, melodic, song-filled, all-singing, all-dancing, rhythmic, showstopping, lyrical, "
    "operatic, jazzy, melodious, high-kicking, brassy, harmonious, razzle-dazzle, syncopated, hummable, theatrical, "
    "sing-along",
    "Mystery": "puzzling, mysterious, enigmatic, cryptic, baffling, twisty, labyrinthine, riddling, secretive, "
    "inscrutable, clue-laden, perplexing, veiled, unsolved, whodunit, shrouded, mystifying, sleuthing, tangled, "
    "elusive",
    "Romance": "romantic, love-struck, swooning, tender, passionate, starry-eyed, amorous, lovelorn, flirtatious, "
    "dreamy, "
    "heart-melting, courtly, besotted, rose-tinted, infatuated, devoted, smitten, kiss-filled, yearning, honeymoon",
    "Sci-Fi": "futuristic, interstellar, cybernetic, extraterrestrial, high-tech, dystopian, robotic, galactic, "
    "space-age, time-bending, speculative, cosmic, post-apocalyptic, holographic, intergalactic, android, "
    "laser-lit, hyperspatial, mind-expanding, quantum",
    "Thriller": "suspenseful, tense, nail-biting, gripping, edge-of-the-seat, taut, nerve-shredding, white-knuckle, "
    "paranoid, menacing, heart-stopping, breathless, claustrophobic, knife-edge, ticking-clock, high-stakes, "
    "cat-and-mouse, unnerving, conspiratorial, sweaty-palmed",
    "War": "war-torn, battle-scarred, embattled, shell-shocked, military, combat-heavy, besieged, bombed-out, "
    "mud-caked, wartime, soldierly, trench-bound, barbed-wire, front-line, heavily shelled, occupied, conscripted, "
    "regimental, blood-and-mud, warlike",
    "Western": "gunslinging, dusty, frontier, spur-jangling, sun-baked, saddle-worn, six-shooting, wild-west, "
    "tumbleweed, "
    "horseback, leathery, prairie, cattle-driving, sagebrush, rawhide, whiskey-soaked, quick-drawing, desert-bound, "
    "pioneering, lawman-led",
}

_GENRE_NOUNS: dict[str, str] = {
    "Action": "explosions, car chases, fistfights, shootouts, stunts, gunfire, kung fu, brawls, helicopters, "
    "machine guns, "
    "martial arts, narrow escapes, hand-to-hand combat, rooftop leaps, one-man armies, speeding trains, karate, "
    "rocket launchers, demolition, commandos, muscle cars, bodyguards, mercenaries, grenades, high falls, "
    "motorcycle chases, knife fights, last stands, punch-ups, collapsing bridges, hijackings, broken glass",
    "Adventure": "treasure maps, lost cities, jungle treks, quests, pirates, hidden temples, shipwrecks, expeditions, "
    "sea voyages, buried gold, desert islands, ancient relics, river rapids, mountain passes, hot-air balloons, "
    "castaways, rope bridges, explorers, caravans, uncharted lands, sword fights, secret passages, safaris, "
    "sailing ships, booby traps, wild beasts, long journeys, deep caves, stowaways, daring rescues, compasses, "
    "volcanoes",
    "Animation": "cartoon gags, talking animals, painted skies, clay figures, singing mice, moving drawings, "
    "animated critters, computer-made worlds, pencil lines, pixel fur, ink and paint, cel art, sketchbook worlds, "
    "googly eyes, cartoon physics, talking toys, dancing teapots, paper cut-outs, puppetry, squash and stretch, "
    "painted forests, speaking fish, giant eyes, wobbly ghosts, flying houses, cartoon villains, bouncing bugs, "
    "animated snowmen, wooden dolls, rainbow colours, storyboard magic, lovable ogres",
    "Children": "puppies, toys, kittens, ponies, bedtime stories, birthday parties, teddy bears, playgrounds, "
    "summer camps, school bullies, imaginary friends, treehouses, family pets, kid heroes, grandparents, sandcastles, "
    "ice cream, snow days, schoolchildren, lost dogs, nannies, sleepovers, bicycles, piglets, orphans, kindergartens, "
    "lullabies, circus animals, pocket money, schoolteachers, candy, hide and seek",
    "Comedy": "jokes, pranks, one-liners, misunderstandings, gags, pratfalls, banter, punchlines, sarcasm, awkward "
    "dinners, "
    "buddy antics, mistaken identities, bad haircuts, office humour, parody, embarrassing parents, frat parties, "
    "silly costumes, clumsy heroes, double entendres, mockery, running jokes, comic timing, lovable losers, "
    "practical jokes, wild parties, funny accents, food fights, satire, bumbling cops, spoofs, stand-up routines",
    "Crime": "heists, mobsters, bank robberies, gangsters, drug deals, hitmen, stolen diamonds, police raids, "
    "kingpins, "
    "con artists, prison breaks, getaway cars, dirty money, informants, crooked cops, extortion, smugglers, "
    "crime families, undercover cops, stick-ups, card sharks, cartels, safecrackers, pickpockets, jailbirds, "
    "loan sharks, counterfeiters, turf wars, wiretaps, street gangs, burglars, ransom notes",
    "Documentary": "interviews, archive footage, real people, hard facts, hidden cameras, eyewitnesses, news reels, "
    "field research, wildlife, statistics, whistleblowers, home videos, public records, real events, "
    "oral history, case studies, expert opinions, hand-held cameras, testimonies, voice-overs, scandals laid bare, "
    "social issues, real voices, fieldwork, reportage, factory farms, daily lives, court files, open questions, "
    "true accounts, behind-the-scenes truths, corporate greed",
    "Drama": "family secrets, grief, broken homes, hard choices, redemption, regret, illness, addiction, poverty, "
    "divorce, "
    "forgiveness, loss, guilt, sacrifice, troubled marriages, coming of age, loneliness, dignity, injustice, "
    "moral dilemmas, fathers and sons, mothers and daughters, courtroom speeches, working lives, second chances, "
    "inner turmoil, betrayal, ageing, quiet despair, hope, small-town lives, estranged siblings",
    "Fantasy": "wizards, dragons, magic spells, unicorns, fairies, prophecies, enchanted forests, wishes, goblins, "
    "crystal balls, giants, magic swords, witches, talking trees, elves, sorcery, potions, mermaids, curses, genies, "
    "magic rings, hobbits, phoenixes, parallel realms, trolls, magic carpets, flying horses, guardian angels, "
    "dark lords, ancient runes, chosen ones, magic mirrors",
    "Film-Noir": "femmes fatales, private eyes, cigarette smoke, rainy streets, blackmail, trench coats, night clubs, "
    "long shadows, neon signs, cheap hotels, dark alleys, venetian blinds, dangerous dames, gumshoes, whisky glasses, "
    "fedoras, doomed lovers, insurance fraud, fatal mistakes, hard-luck men, night trains, street lamps, "
    "piano bars, revolvers, wharf fog, lonely highways, jealous husbands, murky pasts, sultry singers, patsies, "
    "taxi rides, last cigarettes",
    "Horror": "ghosts, zombies, vampires, haunted houses, monsters, werewolves, demons, graveyards, slashers, "
    "exorcisms, "
    "severed limbs, chainsaws, possessed dolls, blood, screams, evil spirits, masked killers, jump scares, creaking "
    "doors, "
    "cannibals, crypts, body parts, fangs, rotting corpses, nightmares, creepy clowns, occult rituals, swarms, "
    "butcher knives, mad doctors, undead hordes, dark basements",
    "Musical": "show tunes, tap dancing, ballads, dance numbers, chorus lines, orchestras, broadway glitz, songs, "
    "duets, stage lights, ballrooms, catchy tunes, rock anthems, piano melodies, music halls, choirs, spontaneous "
    "song, "
    "sequins, high notes, dancing feet, jazz hands, curtain calls, opera arias, big bands, choreography, encores, "
    "dress rehearsals, street dancing, serenades, waltzes, backstage rivalries, violins",
    "Mystery": "clues, detectives, hidden motives, missing persons, red herrings, riddles, secrets, locked rooms, "
    "fingerprints, alibis, amnesia, cold cases, codes, disappearances, strange letters, sleuths, puzzles, "
    "unreliable narrators, plot twists, anonymous calls, suspects, double lives, dead ends, false identities, "
    "secret rooms, old photographs, hidden diaries, unexplained deaths, footprints, inquests, coded messages, "
    "vanished heiresses",
    "Romance": "first love, love letters, kisses, weddings, heartbreak, soulmates, blind dates, love triangles, "
    "candlelit dinners, summer flings, courtship, proposals, forbidden love, long embraces, roses, honeymoons, "
    "secret crushes, reunions, true love, moonlit walks, unrequited love, stolen glances, holiday romances, old "
    "flames, "
    "engagement rings, valentines, slow dances, sweethearts, marriage plots, star-crossed lovers, charm, tenderness",
    "Sci-Fi": "spaceships, aliens, robots, time travel, androids, laser guns, clones, distant planets, black holes, "
    "artificial minds, mutants, parallel universes, space stations, virtual reality, alien invasions, wormholes, "
    "cyborgs, "
    "starfighters, rogue computers, genetic experiments, mad science, moon bases, hyperdrives, cryosleep, time loops, "
    "starships, asteroids, ray guns, nanobots, future cities, teleporters, supercomputers",
    "Thriller": "suspense, stalkers, hostages, conspiracies, double agents, cover-ups, kidnappers, serial killers, "
    "ticking bombs, spies, assassins, manhunts, sabotage, terrorists, mind games, hidden bombs, traitors, phone taps, "
    "wrongly accused men, secret agents, deadly bargains, snipers, hackers, close calls, blackmailers, state secrets, "
    "fugitives, tailing cars, poison, psychopaths, witness protection, deadlines",
    "War": "soldiers, battlefields, trenches, tanks, air raids, generals, platoons, prisoners of war, bombers, "
    "snipers' nests, "
    "field hospitals, barracks, submarines, minefields, artillery, barbed wire, bunkers, medals, resistance fighters, "
    "boot camps, convoys, paratroopers, beach landings, draftees, fighter pilots, sieges, ceasefires, war wounds, "
    "camouflage, deserters, cavalry charges, warships",
    "Western": "cowboys, gunfights, saloons, sheriffs, outlaws, cattle drives, horses, stagecoaches, bounty hunters, "
    "dusty towns, showdowns, ranches, gold rushes, spurs, six-shooters, wanted posters, open prairies, campfires, "
    "train robberies, homesteads, desert canyons, lassos, posses, duels at noon, wagon trains, poker tables, "
    "ghost towns, rustlers, gunslingers, frontier justice, marshals, saddlebags",
}

_ERA_ADJECTIVES: dict[str, str] = {
    "1940s": "golden-age, wartime-era, pre-television, nitrate-era, studio-era",
    "1950s": "fifties, atomic-age, drive-in, early-widescreen, rock-and-roll-era",
    "1960s": "sixties, swinging, flower-power, space-race-era, mod",
    "1970s": "seventies, disco-era, bell-bottomed, gritty seventies, new-hollywood",
    "1980s": "eighties, neon-lit, synth-scored, arcade-era, big-haired",
    "1990s": "nineties, grunge-era, video-store, dial-up-era, pre-millennial",
    "2000s": "two-thousands, dvd-era, post-millennial, flip-phone-era, early-internet",
    "2010s": "twenty-tens, smartphone-era, streaming-era, present-day, superhero-age",
}

# MovieLens tags that say something about a film (no names, no verdicts, no awards), as MovieLens users write them.
_TAGS = (
    "atmospheric, thought-provoking, surreal, quirky, visually appealing, mental illness, high school, religion, "
    "psychology, politics, shakespeare, journalism, holocaust, disturbing, christmas, anime, boxing, "
    "adultery, adolescence, vietnam, philosophical, india, england, australia, world war ii, stylized, sexuality, "
    "revenge, "
    "racism, hallucinatory, heartwarming, dark comedy, black comedy, social commentary, prostitution, disability, "
    "death, "
    "cult film, clever, cerebral, bible, assassination, twins, terrorism, television, pregnancy, gothic, gambling, "
    "dystopia, depressing, business, black and white, space opera, samurai, president, inspirational, intelligent, "
    "mafia, superhero, comic book, twist ending, court, remake, movie business, animal movie, men in drag, sports, "
    "baseball, football, rock and roll, nudity, london, paris, japan, new york, slavery, immigrants, school, lawyers, "
    "suburbia, nonlinear, existentialism, memory, chess, video games, road trip"
)

_TAG_ADJECTIVES = (
    "atmospheric, thought-provoking, surreal, quirky, visually appealing, disturbing, philosophical, stylized, "
    "hallucinatory, heartwarming, clever, cerebral, gothic, depressing, inspirational, intelligent, nonlinear"
)


@dataclass(frozen=True, slots=True)
class Keyword:
    """One keyword: its text, its kind ("adjective" or "noun"), and its group (a genre, an era or "Tag")."""

    text: str
    kind: Kind
    group: str


TAG_GROUP = "Tag"


@cache
def lexicon() -> tuple[Keyword, ...]:
    """All keywords, in the order in which they are written here; every text occurs once."""
    words: list[Keyword] = []
    for genre in GENRES:
        words += [Keyword(text, "adjective", genre) for text in _GENRE_ADJECTIVES[genre].split(", ")]
        words += [Keyword(text, "noun", genre) for text in _GENRE_NOUNS[genre].split(", ")]
    for era in ERAS:
        words += [Keyword(text, "adjective", era) for text in _ERA_ADJECTIVES[era].split(", ")]
    adjectives = set(_TAG_ADJECTIVES.split(", "))
    words += [Keyword(text, "adjective" if text in adjectives else "noun", TAG_GROUP) for text in _TAGS.split(", ")]
    return tuple(words)
