"""Lists of everyday words in several languages, written for this project; train and test words are disjoint."""

from __future__ import annotations

_TRAIN = {
    "en": """
        about above after again always apple april arm ask autumn away baby back bag ball bamboo banana basket bath beach bean beautiful
        bed before begin behind bell below better between big bird black blue boat body book both bottle bottom box boy branch bread
        bridge bring brother brown bubble build bus but butter button by call camera candle cap car careful carry cat chair change cheap
        cheese child choose city clean climb clock cloud coat coffee cold come cook corner count cow cup dance dark daughter day deep
        deer dinner dish do dog door down dream dress drink drive drop dry each early earth easy eat egg eight empty evening ever every
        eye face fall family far farm father feather feel feet few field fifty fill video find finger fire first fish five floor flower
        fly follow food foot for forest forget four free fresh friend from front fruit full funny game garden gate gentle gift girl give
        glass go gold good grandma grass great green grey ground grow guess had half hall hammer hand happy hard hat have he head hear
        heart heavy hello help her here hill him history hold home honey hope horse hot hour house how hundred hurry idea if important
        in inside island it jam job join jump just keep key kind kitchen know lamp land large last late laugh leaf learn leave left
        lemon less letter life light like lion listen little live long look lose lot loud love low lucky lunch make mama man many map
        maybe me meadow mean meet member memory middle milk mind minute mirror miss money month moon more morning most mother mountain
        mouse mouth move much music must my name near never new next nice night nine no north nose nothing now number ocean of off
        office often oil old on once one only open orange other our out over own page paint paper parent part party path people pepper
        perhaps phone picture piece place plan plate play please pocket point poor pop possible potato power problem promise proud
        public pull purple push put quick quiet quite rain read ready real red remember rest rice rich right ring river road rock roof
        room rope round run safe sail salt same sand saw say school sea season second see seed seem send seven shall shape she sheep
        ship shirt shoe shop short should show shut side simple since sing sister sit six sky sleep slow small smile smoke snow so soap
        soft some son song soon sound soup south space speak spoon spring square stairs stand star start station stay step still stone
        stop story street strong such sugar summer sun supper sure sweet swim table tail take tall tea teach tell ten than thank that
        the their them then there these they thick thin thing think third this those three through time tiny to today together tomato
        tomorrow too tooth top touch town toy train travel tree true try turn twelve two umbrella under until up us use valley very
        village visit voice wait walk wall want warm was wash watch water wave way we weather week well were west what wheel when where
        which while white who whole why wide will win wind window winter wish with woman wonder wood word work world worm would write
        wrong year yellow yes yesterday you young""",
    "de": """
        aber abend alle alt apfel auge auto baum berg bitte blau blume boot breit brief brot bruder buch dach danke dann dort drei
        dunkel du einfach eis ende er es fahren familie farbe fenster feuer finden fisch fluss frau freude frisch fuß garten geben gehen
        gelb genau gestern glas glück groß grün gut haben hand haus heiß hell herbst heute himmel hoch hören hund ich immer in ist ja
        jung kaffee kalt katze kaufen kind kirche klein kommen können kopf küche lachen lampe land laufen leben leicht lesen licht
        lieben machen mann meer mein mensch milch mit mond morgen müde mutter nacht nah name neu nicht nie oben oder ohne papier pferd
        platz regen rot ruhig sagen salz schiff schlafen schnee schön schreiben schuh schule schwester sehen sein sie singen sommer
        sonne spielen stadt stein straße suppe tag tasche tief tisch tür und unten vater viel vogel von vor wald warm was wasser weg
        wein weiß weit welt wenig wer wetter wind winter wir wo woche wort zeit""",
    "es": """
        abajo abrir abuelo agua ahora aire alegre algo alto amarillo amigo amor año árbol arena arriba azul bajo barco beber bien blanco
        boca bonito bosque brazo bueno caballo cabeza café calle caliente cama camino campo cantar casa cerca cielo ciudad claro coche
        cocina comer cómo correr corto cosa cuando cuatro decir dedo después día dinero donde dormir dos dulce ella en entrar escribir
        escuela estrella familia feliz fiesta flor frío fruta fuego fuerte gato gente grande guitarra hablar hacer hambre hermano hijo
        hoja hombre hora hoy huevo invierno isla jardín joven juego largo leche leer lejos libro limón llave lluvia luna luz madre mano
        mañana mar mesa mucho mujer mundo música nada negro nieve niño noche nombre nosotros nube nuevo nunca ojo otro padre pan papel
        para pequeño perro pez piedra playa pobre poco por primavera puerta queso rápido reloj río rojo ropa sal semana siempre silla
        sol sombrero sueño tarde tiempo tierra todo trabajo""",
    "fr": """
        ami amour animal année arbre argent assez aujourd'hui aussi automne avec beau beaucoup blanc bleu boire bois bon bonjour bouche
        bras café campagne chaise chambre chaud chemin cheval cheveux chez chien ciel clair coeur comme corps couleur courir cuisine
        dans demain dent dormir doux eau école écrire elle enfant ensemble entre été étoile famille femme fenêtre fête feu feuille fille
        fleur fort fou frère froid fromage fruit garçon gentil grand gris heure heureux hiver homme île image jamais jambe jardin jaune
        jeune jouer jour lait lampe léger lettre lire livre loin long lumière lune main maison manger marche matin mer merci mère monde
        montagne mot mur musique neige noir nom nous nouveau nuage nuit oiseau orange ouvrir pain papa papier parler partir petit peuple
        pied pierre plage pluie pomme pont porte pour premier printemps quand rire rivière robe rouge rue sable sel semaine simple soeur
        soir soleil souvent sucre table temps terre""",
    "it": """
        acqua albero allora alto amico amore anno aprire arancia aria autunno bambino barca basso bella bene bere bianco bocca bosco
        braccio buono caffè caldo camera campo cane cantare capello casa cavallo cena chiaro chiave cielo città colore come correre cosa
        cucina cuore dente dolce domani donna dopo dormire estate famiglia felice festa finestra fiore fiume foglia forte fratello
        freddo frutta fuoco gamba gatto gelato gente giallo giardino giorno giovane grande grazie inverno isola lago lampada latte
        leggere lettera letto libro limone lontano luce luna lungo madre mangiare mano mare mattina mela mese mondo montagna musica nero
        neve niente nome notte nuovo nuvola occhio oggi ombra ora padre pane parlare parola passo pesce piccolo piede pietra pioggia
        ponte porta primo quando rosso sabbia sale scrivere scuola sempre sera sole sorella spiaggia stella strada tavolo tempo terra
        tutto uomo uovo vecchio vedere vento verde vino vita voce zucchero""",
    "pt": """
        abrir água alegre alto amanhã amarelo amigo amor ano areia árvore azul baixo barco beber bem boca bom bonito braço branco cabeça
        cachorro café calor cama caminho campo cantar casa cavalo cedo céu chuva cidade claro coisa comer como coração correr cozinha
        criança dedo dentro depois dia dinheiro doce dormir ela escola escrever estrela família feliz festa filho flor floresta fogo
        folha forte frio fruta gato gente grande hoje homem hora ilha inverno irmão janela jardim jovem lado leite ler leve limão livro
        longe lua luz mãe mão mar mesa montanha muito mulher mundo música nada neve noite nome nós novo nunca nuvem olho ontem ouvir ovo
        pai palavra pão papel passar pé pedra peixe pequeno perto ponte porta pouco praia preto primavera queijo quente rápido rio rir
        rosa roupa rua sal semana sempre sol sonho tarde tempo""",
    "nl": """
        aan aarde alles altijd appel avond bal berg beter bij blauw blij bloem boek boom boot brief brood broer bruin buiten dag dank
        deur dicht donker dorp drie droom eten familie feest fiets fris gaan geel geven gezin glas goed gras groen groot haar hand hart
        heel hemel herfst hier hond hoofd huis ijs jaar jong kaas kamer kat keuken kind klein koffie koken komen koud kort lachen lamp
        land lang leven lezen licht lief lopen lucht maan man meer melk mens moeder mond mooi morgen muziek naam nacht neus nieuw nooit
        oma onder oog oud paard papier plaats praten raam regen rivier rood rustig school schip schrijven slapen sneeuw snel soep spelen
        stad steen straat suiker tafel tijd tuin uur vader veel vis vogel voor vriend vrouw vuur warm water weg wereld wij wind winter
        wit woord zand zee zingen zomer zon zout zuster zwart""",
    "sv": """
        alla alltid arbete barn berg björn blad blomma blå bok bord bra brev bro bror bröd båt dag djup dotter dröm eld familj far fisk
        flicka flod fot fram frukt fågel färg fönster gammal glad gran gräs grön gul gå hand hav hem himmel hjärta hund hus höst is jord
        kaffe kall katt kniv komma kort kvinna kväll kök lampa leva ljus lugn lång läsa löv man mat mjölk moln mor morgon mun måne
        mycket namn natt nu ny ofta ost papper pojke regn rum röd salt sand se sjö sjunga skog skola sko skriva snö sol sommar sova stad
        stark stjärna stor strand stund syster säga söt tack tala tid torg träd tyst vacker varm vatten vecka vi vind vinter vit vän väg
        värld äpple öga öppna över""",
    "fi": """
        aamu aika aina aurinko avain hyvä ilma ilo ilta isä jalka joki joulu juna juoda kahvi kala kaunis kaupunki kello kesä keittiö
        kevät kieli kirja kissa kivi koira koti koulu kukka kuu kylmä käsi laiva lapsi laulu leipä lintu lumi lämmin maa maito matka
        meri metsä mies minä muistaa musta muna mökki nimi nainen nuori nyt omena onni ovi pallo pieni pilvi poika puhua puu pyörä päivä
        pöytä ranta ruoka saari sade sana sateenvarjo silmä sininen suola suu suuri syksy sydän sänky taivas talo talvi tie tuuli tyttö
        tähti uusi vene vesi viikko yö ystävä""",
    "tr": """
        ağaç akşam anne araba arkadaş at ay ayak baba bahar bahçe balık bardak baş beyaz bir bugün bulut büyük cam çay çiçek çocuk çok
        deniz dere dost dün dünya ekmek el elma erken ev gece gel gemi geniş gök göl göz güçlü gün güneş güzel hava hayat her ışık iyi
        kahve kalem kapı kar kara kardeş kedi kış kitap kız kırmızı köpek köprü köy kum kuş küçük mavi masa meyve mutlu müzik nehir oda
        okul orman oyun para peynir pencere rüzgar sabah saç sarı sen ses sıcak soğuk sokak su süt şehir şeker tatlı taş tuz uzun uyku
        yağmur yaprak yaz yeni yeşil""",
    "id": """
        air anak angin api awan ayah ayam bagus baik bambu banyak baru batu bayi belajar beli besar bibi biru buah bukan buku bulan bumi
        bunga burung cepat dan danau dapur datang daun dekat dia dingin dua gelas gigi gula gunung hari hati hijau hujan hutan ibu ikan
        indah ini itu jalan jam jauh jendela kaki kami kapal kecil kopi kota kucing kuda kuning kursi laut lagu lampu langit lihat lima
        makan malam manis mata matahari meja merah minum muda mulut nama nasi padi pagi pantai pasar pasir pergi pintu pohon pulang
        pulau putih rumah sahabat satu sawah""",
    "pl": """
        babcia biały bardzo brat bułka chleb chmura ciepły cukier czas czerwony dach deszcz dobry dom droga drzewo duży dziecko dzień
        gdzie góra gwiazda herbata jabłko jasny jeden jesień jezioro kamień kawa kobieta kolor koń kot kraj krótki książka księżyc
        kuchnia kwiat las lato list liść ludzie łąka łódka mama masło matka miasto mleko młody morze most mówić mysz niebo nigdy noc
        nowy ogień ogród okno oko ojciec owoc papier pies piękny pić pisać plaża pociąg pole pomoc praca ptak ręka rower ryba rzeka sen
        serce ser siostra słońce słowo sobota""",
    "sw": """
        asali asubuhi baba bahari barabara baridi bibi bustani chai chakula chumvi dada dunia embe familia furaha gari habari hewa jicho
        jina jioni jirani jua kaka kahawa kalamu karibu kazi kesho kiatu kidogo kijana kijiji kikombe kisiwa kitabu kiti kubwa kuimba
        kula kuku leo lugha maisha maji mama mawingu maziwa mbali mbuzi mboga mchana mchezo meza mkate mkono mlango mlima moja moto moyo
        mpira mti mto mtoto muziki mvua mwaka mwezi nchi ndege ndizi ndoto nyota nyumba paka pamoja pole pwani rafiki safari samaki saa
        shamba shule siku simba sukari""",
}

_TEST = {
    "en": """
        adventure airport almost anything balloon bandage bagpipe blanket blossom brave breakfast broom captain carpet cave cheerful
        chimney circle comfortable copper cotton cousin crown curtain desert diamond different doctor eleven engine everybody example
        favourite fence festival fox furniture goose grape harbour helmet hospital hungry imagine invitation jacket journey jungle
        kettle ladder language lazy library machine magic market mushroom museum napkin needle neighbour notebook opposite oven palm
        pebble pencil piano pillow pilot popcorn popular puppet puzzle rabbit railway remove ribbon robin rubber sandwich science
        seventy shadow shelf shoulder silver spider squirrel storm swing thunder ticket tiger tower treasure trumpet uncle useful
        vegetable violin volcano waterfall whisper wolf zebra""",
    "de": """
        ameise bäcker bahnhof becher birne brille brücke dampf eimer ente erdbeere fabrik feder flöte frosch gabel gebirge hafen hummel
        igel insel jacke kamel keller kuchen löffel mauer messer möbel nebel ofen pfanne pilz quelle rabe regenbogen schatten schloss
        spiegel tasse teppich treppe uhu vorhang wiese wolke wurzel zebra ziege zwiebel""",
    "es": """
        abeja almohada avión ballena bandera bicicleta bufanda búho cebolla ciruela cocinero cuchara cuento dibujo elefante espejo farol
        globo hormiga iglesia jirafa lápiz lobo mariposa mercado miel molino montaña naranja nido oveja palabra pantalón pared pimienta
        pluma pueblo puente ratón sandía tambor tijera tomate trigo uva ventana verano viento zapato zorro""",
    "fr": """
        abeille avion balai bateau bouteille brouillard bureau cerise chapeau château citron cloche couteau escalier fourmi gâteau
        grenouille horloge huile jupe lapin loup manteau miel mouton nappe navire noisette oignon panier parapluie pêche plume poisson
        poivre poupée renard rideau sapin singe souris tambour tasse tiroir tortue usine vache valise vitrine voisin""",
    "it": """
        ape bicchiere biscotto borsa bottiglia candela cappello ciliegia coltello coniglio cuscino elefante farfalla formica forno
        fragola giacca gomma lupo maiale mucca nonna orologio orto palla pecora penna pepe pettine pianta pomodoro quaderno ragno rana
        sapone scala scarpa sciarpa sedia specchio tappeto tazza tetto topo torre treno uva vaso volpe zaino""",
    "nl": """
        aap aardbei bakker beker bezem borstel brug duif eekhoorn eend emmer fluit gordijn hamer haven honing jas kers kikker kip koe
        kussen lepel mes muur olifant pompoen peper peer potlood raaf ratel schaap schoen sleutel spiegel spin tapijt toren trap trein
        ui vlinder vork wolk wortel zak zebra zeep""",
    "fi": """
        ankka appelsiini banaani hattu hevonen hiiri hunaja juusto kaappi kana kanto karhu kenkä ketju kettu kynä kuppi kirahvi lammas
        lasi lehmä lusikka mato metro mansikka mustikka niitty norsu orava peili peruna piano pilli pippuri porkkana repo sammakko
        sipuli sohva susi takki tikku torni tuoli tyyny valas veitsi voi""",
    "id": """
        apel bantal bebek bola botol celana cermin domba gajah garam harimau istana jagung jeruk kambing kancil kapas kelapa kelinci
        kereta kunci kupu lemari lobak madu mangga mawar menara nanas panci payung pena perahu pisang rambut roti rusa sabun sapi sendok
        sepatu singa tangga telur tikus tomat topi ular wortel""",
    "ro": """
        albină apă bunică bucătar broască câine cal carte cămașă cerb cireașă copac drum fluture foc frunză furnică ghindă iarbă iepure
        lampă lapte lingură lună lup mamă măgar masă măr miere munte noapte oraș pădure pâine pasăre pat pernă pește piatră ploaie pod
        prieten rață soare stradă toamnă urs vară vulpe""",
}


def _split_words(table: dict[str, str]) -> dict[str, tuple[str, ...]]:
    return {language: tuple(dict.fromkeys(text.split())) for language, text in table.items()}


WORDS = {"train": _split_words(_TRAIN), "test": _split_words(_TEST)}
